"""The hub's problem sets end to end, with a stand-in for the hub on this machine."""

import json
import re
import shlex
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from stand_in_hub import Hub, in_a_process, lines

# Columns and splits as the hub's datasets have them; problems of our own.
REPOSITORIES = {
    "openai/gsm8k": {
        "README.md": b"---\nconfigs:\n- config_name: main\n  data_files:\n"
        b"  - {split: train, path: train.jsonl}\n  - {split: test, path: test.jsonl}\n"
        b"- {config_name: socratic, data_files: other.jsonl}\n---\n",
        "train.jsonl": lines({"question": "1 + 1?", "answer": "It is 2.\n#### 2"}),
        "test.jsonl": lines(
            {"question": "600 + 634?", "answer": "600 + 634 = <<600+634=1234>>1,234\n#### 1,234"},
            {"question": "2 - 5?", "answer": "Less than 0.\n#### -3"},
        ),
        "other.jsonl": lines({"question": "?", "answer": "#### 0"}),
    },
    "HuggingFaceH4/MATH-500": {
        "test.jsonl": lines(
            {
                "problem": "Half of $x$?",
                "solution": r"It is $\boxed{\frac{x}{2}}$.",
                "answer": r"\frac{x}{2}",
                "subject": "Algebra",
                "level": 1,
                "unique_id": "test/algebra/1.json",
            }
        )
    },
    "HuggingFaceH4/aime_2024": {
        "train.jsonl": lines({"id": 60, "problem": "3 + 4?", "answer": "007", "year": "2024"})
    },
    "math-ai/aime25": {"test.jsonl": lines({"problem": "9?", "answer": "9", "id": "0"})},
    "someone/own": {"dev.jsonl": lines({"q": "1 + 2?", "a": 3}, {"q": "no answer", "a": None})},
}
ASK = """
import json, sys
from pear_ray.config.problems import HubProblems
from pear_ray.config.rewards import RewardConfig
from pear_ray.errors import InputError
from pear_ray.tasks.components import load_verifier
from pear_ray.tasks.entries import answer_of
from pear_ray.tasks.problem_sets import check_verifiable, content_of, make_problems

rewards = RewardConfig.model_validate({"components": [{"kind": "math"}]})
answers = {}
for text in sys.argv[1:]:
    config = HubProblems.model_validate({"kind": "hub"} | json.loads(text))
    try:
        problems = make_problems(config)
        check_verifiable(problems, rewards)
        verify = load_verifier(rewards)
        answers[config.name] = {
            "content": content_of(config)["problems"],
            "rows": [[p.problem_id, p.question, answer_of(p)] for p in problems],
            "verdicts": [str(verify(p, f"So {answer_of(p)}").status) for p in problems],
        }
    except InputError as error:
        answers[config.name] = str(error)
print(json.dumps(answers))
"""
BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub(REPOSITORIES) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def ask(*sets: dict[str, Any], home: Path, address: str, offline: bool = False) -> dict[str, Any]:
    done = in_a_process(ASK, *map(json.dumps, sets), home=home, address=address, offline=offline)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_known_sets_are_read_by_name(hub: Hub, tmp_path: Path) -> None:
    pytest.importorskip("math_verify", reason="extra `math`")
    names = ("gsm8k", "math-500", "aime-2024", "aime-2025")
    found = ask(*({"name": name} for name in names), home=tmp_path, address=hub.address)
    assert found["gsm8k"]["rows"] == [
        ["gsm8k/1", "600 + 634?" + BOXED, "1234"],
        ["gsm8k/2", "2 - 5?" + BOXED, "-3"],
    ]
    half = ["math-500/test/algebra/1.json", "Half of $x$?" + BOXED, r"\frac{x}{2}"]
    assert found["math-500"]["rows"] == [half]
    assert found["aime-2024"]["rows"] == [["aime-2024/60", "3 + 4?" + BOXED, "007"]]
    assert found["aime-2025"]["rows"] == [["aime-2025/0", "9?" + BOXED, "9"]]
    assert found["gsm8k"]["verdicts"] == ["ok", "ok"]
    assert found["aime-2024"]["verdicts"] == ["ok"]
    assert len({each["content"] for each in found.values()}) == 4


def test_other_sets_splits_and_what_is_wrong_with_them(hub: Hub, tmp_path: Path) -> None:
    pytest.importorskip("math_verify", reason="extra `math`")
    columns = {"columns": {"prompt": "q", "answer": "a"}}
    own = {"name": "someone/own", "split": "validation", "prompt_template": "{prompt}", **columns}
    asked = [{"name": "gsm8k", "split": "train"}, own, {"name": "math-500", "size": 2}]
    found = ask(*asked, {"name": "someone/absent"}, home=tmp_path, address=hub.address)
    assert found["gsm8k"]["rows"] == [["gsm8k/1", "1 + 1?" + BOXED, "2"]]
    assert found["someone/own"].startswith("hub:someone/own row 2: answer: missing, and the comp")
    assert found["math-500"].startswith("hub:HuggingFaceH4/MATH-500: has 1 problems; size=2 wanted")
    assert found["someone/absent"].startswith("hub:someone/absent: no split 'test' to be had (")
    kept = ask(own | {"size": 1}, home=tmp_path, address=hub.address)
    assert kept["someone/own"]["rows"] == [["own/1", "1 + 2?", "3"]]


def test_offline_says_how_to_fetch_and_that_command_does_it(hub: Hub, tmp_path: Path) -> None:
    pytest.importorskip("math_verify", reason="extra `math`")
    nowhere, one = "http://127.0.0.1:1", {"name": "gsm8k"}
    unreachable = ask(one, home=tmp_path, address=nowhere)["gsm8k"]
    assert unreachable.startswith("hub:openai/gsm8k: the hub cannot be reached (Connect")
    offline = ask(one, home=tmp_path, address=nowhere, offline=True)["gsm8k"]
    assert offline.startswith("hub:openai/gsm8k: no split 'test' to be had (")
    for message in (unreachable, offline):
        assert "\n" not in message
        command = re.search(r'python -c "[^"]*"', message)
        assert command
        assert shlex.split(command[0])[:2] == ["python", "-c"]
    script = shlex.split(command[0])[2]
    fetched: subprocess.CompletedProcess[str]
    fetched = in_a_process(script, home=tmp_path, address=hub.address)
    assert fetched.returncode == 0, fetched.stderr
    found = ask(one, home=tmp_path, address=nowhere, offline=True)["gsm8k"]
    assert found == ask(one, home=tmp_path, address=hub.address)["gsm8k"]
    assert [answer for _, _, answer in found["rows"]] == ["1234", "-3"]
