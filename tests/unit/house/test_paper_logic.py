"""SynLogic and Enigmata as paper_logic.yaml has them, against stand-ins for their repositories.

The stand-ins have the modules and signatures of theirs (MiniMax-AI/SynLogic at 6794f97,
BytedTsinghua-SIA/Enigmata at b9c6f59); the games in them are made up.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pear_ray.config.problems import FileProblems
from pear_ray.config.rewards import RewardConfig
from pear_ray.config.run import load_run
from pear_ray.records import Problem, RewardStatus
from pear_ray.tasks.problem_files import read_problems
from pear_ray.tasks.reward_pool import RewardPool

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "jobs" / "runs" / "paper_logic.py"
RUN = load_run(ROOT / "jobs" / "runs" / "paper_logic.yaml")
SYNLOGIC = {
    "base/data.py": """\
import json
class Data:
    def __init__(self, question, answer, difficulty=1, metadata=None, **kwargs):
        self.question, self.answer, self.metadata = question, answer, metadata
    @classmethod
    def from_json_str(cls, text):
        return cls(**json.loads(text))
""",
    "task2verifier.py": """\
print("where I am")
class Echo:
    def verify(self, data, test_solution):
        print("looking")
        return test_solution == data.answer + data.metadata["ending"]
verifier_classes = {"echo": Echo}
""",
}
ENIGMATA = {
    "verifiable_tasks/tasks/grid/verifier.py": """\
import json
def verify(pred, answer, meta):
    if pred == "boom":
        raise RuntimeError("grid cannot read this")
    if pred == "almost":
        return 0.5
    return 1 if json.loads(pred) == answer and json.loads(meta)["size"] == 2 else 0
""",
}


@pytest.fixture
def clones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Both repositories, and ours, where verifier processes look for modules."""
    for name, text in (SYNLOGIC | ENIGMATA).items():
        (tmp_path / "clones" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "clones" / name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(sys, "path", [str(ROOT), str(tmp_path / "clones"), *sys.path])
    return tmp_path


def problem_file(folder: Path, kind: str, rows: list[dict[str, Any]], *options: str) -> Path:
    source, target = folder / kind / "en" / "train.jsonl", folder / f"{kind}.jsonl"
    source.parent.mkdir(parents=True)
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    command = [sys.executable, str(SCRIPT), kind, str(folder / kind), str(target), *options]
    subprocess.run(command, env={"PYTHONPATH": str(ROOT)}, check=True, capture_output=True)
    return target


def problems_of(path: Path) -> list[Problem]:
    return read_problems(FileProblems(kind="file", path=str(path)))


def verdicts(config: RewardConfig, problem: Problem, *completions: str) -> list[RewardStatus]:
    with RewardPool(config) as pool:
        return [each.status for each in pool.verify_all([(problem, c) for c in completions])]


def synlogic_row(task: str, prompt: str) -> dict[str, Any]:
    game = {"question": prompt, "answer": "4", "difficulty": 1, "metadata": {"ending": "!"}}
    return {
        "data_source": task,
        "prompt": [{"role": "user", "content": prompt}],
        "extra_info": {"game_data_str": json.dumps(game | {"gpt_response": ""})},
    }


def test_synlogics_verifier_judges_its_rows(clones: Path) -> None:
    path = problem_file(clones, "synlogic", [synlogic_row("echo", "2 + 2?")])
    [problem] = problems_of(path)
    assert problem.question == "2 + 2?"
    found = verdicts(RUN.corpus.rewards, problem, "4!", "4")
    assert found == [RewardStatus.OK, RewardStatus.FAILED]


def test_enigmatas_verifier_judges_its_rows_and_its_errors_are_errors(clones: Path) -> None:
    row = {"prompt": "Fill it.", "answer": [[1, 2], [2, 1]], "task_name": "grid"}
    path = problem_file(clones, "enigmata", [row | {"meta": '{"size": 2}', "ability": "PUZZLE"}])
    [problem] = problems_of(path)
    found = verdicts(RUN.rl.rewards, problem, "[[1, 2], [2, 1]]", "[]", "almost", "boom")
    failed = RewardStatus.FAILED
    assert found == [RewardStatus.OK, failed, failed, RewardStatus.ERRORED]


def test_tasks_are_mixed_and_can_be_left_out(clones: Path) -> None:
    rows = [synlogic_row("echo", f"question {i}") for i in range(50)]
    rows += [synlogic_row("mathador", f"24 of {i}") for i in range(50)]
    mixed = [problem.question for problem in problems_of(problem_file(clones, "synlogic", rows))]
    assert sorted(mixed) == sorted(row["prompt"][0]["content"] for row in rows)
    assert 15 < sum("24 of" in question for question in mixed[:50]) < 35
    without = clones / "again"
    path = problem_file(without, "synlogic", rows, "--without", "mathador")
    assert [each.question for each in problems_of(path)] == [
        question for question in mixed if "24 of" not in question
    ]
