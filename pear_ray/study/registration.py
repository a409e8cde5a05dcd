"""What a study says it will do, written down before it does it."""

import hashlib
import json
import time
from pathlib import Path
from typing import Any

from pear_ray.artifacts.run_dir import write_json
from pear_ray.artifacts.study_facts import RegistrationFacts
from pear_ray.config.study_plan import Cell, StudyPlan

REGISTRATION_FILE = "registration.json"
# What the outcome depends on and what it is judged by; not how the machine is used.
_HELD_TO = ("seeds", "tune", "score", "primary", "confidence")


def register(plan: StudyPlan, study_dir: Path) -> None:
    """Write down what `plan` will be held to, unless that was done before; nothing is replaced."""
    path = study_dir / REGISTRATION_FILE
    if plan.study.registered and not path.exists():
        write_json(path, {"time": time.time(), "first_rl_time": None, "content": _content(plan)})


def begin_rl(study_dir: Path) -> None:
    """Note when the first RL of the study began."""
    path = study_dir / REGISTRATION_FILE
    if path.exists():
        said = json.loads(path.read_text(encoding="utf-8"))
        if said["first_rl_time"] is None:
            write_json(path, said | {"first_rl_time": time.time()})


def registration_facts(study_dir: Path) -> RegistrationFacts | None:
    """What was registered; None where nothing was."""
    path = study_dir / REGISTRATION_FILE
    if not path.exists():
        return None
    said = json.loads(path.read_text(encoding="utf-8"))
    digest = hashlib.sha256(json.dumps(said["content"], sort_keys=True).encode()).hexdigest()
    return RegistrationFacts(
        time=said["time"], first_rl_time=said["first_rl_time"], content_hash=digest[:20]
    )


def changes(plan: StudyPlan, study_dir: Path) -> list[str]:
    """In words, what is no longer as it was registered."""
    path = study_dir / REGISTRATION_FILE
    if not path.exists():
        return []
    then, now = json.loads(path.read_text(encoding="utf-8"))["content"], _content(plan)
    words = [
        f"{key} was {json.dumps(then[key])} and is {json.dumps(now[key])}"
        for key in _HELD_TO
        if then[key] != now[key]
    ]
    arms = sorted(then["runs"].keys() | now["runs"].keys())
    for arm in arms:
        if arm not in now["runs"]:
            words.append(f"arm {arm} is no longer there")
        elif arm not in then["runs"]:
            words.append(f"arm {arm} was added")
        elif then["runs"][arm] != now["runs"][arm]:
            words.append(f"arm {arm} has other settings")
    return words


def _content(plan: StudyPlan) -> dict[str, Any]:
    study = json.loads(plan.study.model_dump_json())
    return {key: study[key] for key in _HELD_TO} | {
        "runs": {arm: _settings(plan, arm) for arm in plan.arms}
    }


def _settings(plan: StudyPlan, arm: str) -> dict[str, Any]:
    """Of an arm's run all that decides its numbers."""
    run = plan.run_of(Cell(arm=arm, seed=plan.study.seeds[0]))
    tree = json.loads(run.model_dump_json())
    return {key: tree[key] for key in ("models", "corpus", "score", "sft", "rl", "evaluate")}
