"""`hub:NAME` end to end, with a stand-in for the hub on this machine: the few answers it needs."""

import json
import threading
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from stand_in_hub import Hub, in_a_process, lines

ROWS = [{"prompt": f"{n} + 1 =", "completion": str(n + 1)} for n in range(3)]
TWO_CONFIGURATIONS = """\
---
configs:
- {config_name: main, data_files: main.jsonl}
- {config_name: other, data_files: other.jsonl}
---
"""
# Asked in a process of its own: the libraries read their addresses and switches on import. Reading
# rows as `pear` does would import torch, and take seconds more.
ASK = """
import json, sys
from pear_ray.config.corpus import DatasetCorpus
from pear_ray.corpus.files import corpus_fingerprint
from pear_ray.corpus.parts import find_parts
from pear_ray.corpus.saved import open_dataset
from pear_ray.errors import InputError

answers = {}
for name in sys.argv[1:]:
    path, _, split = name.partition("#")
    tree = {"kind": "dataset", "path": path, "rows_per_part": 2, "split": split or "train"}
    corpus = DatasetCorpus.model_validate(tree)
    try:
        fingerprint = corpus_fingerprint(corpus)
        rows = [
            (part.index, row)
            for part in find_parts(corpus)
            for row in open_dataset(part.file, part.format, corpus.split).select(
                range(part.begin, part.end)
            )
        ]
        answers[name] = [fingerprint, rows]
    except InputError as error:
        answers[name] = str(error)
print(json.dumps(answers))
"""


REPOSITORIES: dict[str, dict[str, bytes]] = {
    "someone/rows": {"train.jsonl": lines(*ROWS), "test.jsonl": lines(ROWS[0])},
    "someone/two": {
        "README.md": TWO_CONFIGURATIONS.encode(),
        "main.jsonl": lines(ROWS[0]),
        "other.jsonl": lines(ROWS[1]),
    },
    "someone/broken": {"train.jsonl": b"{not json\n"},
    "someone/script": {"script.py": b"import datasets\n"},
}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub(deepcopy(REPOSITORIES)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def ask(*names: str, home: Path, address: str, offline: bool = False) -> dict[str, Any]:
    """What the names come to, in a process of its own: fingerprint and rows, or the error."""
    done = in_a_process(ASK, *names, home=home, address=address, offline=offline)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_names_and_what_is_wrong_with_them(hub: Hub, tmp_path: Path) -> None:
    found = ask(
        "hub:someone/rows",
        "hub:someone/rows#test",
        "hub:someone/rows#dev",
        "hub:someone/absent",
        "hub:someone/two",
        "hub:someone/broken",
        "hub:someone/script",
        home=tmp_path,
        address=hub.address,
    )
    fingerprint, rows = found["hub:someone/rows"]
    assert rows == [[0, ROWS[0]], [0, ROWS[1]], [1, ROWS[2]]]
    assert found["hub:someone/rows#test"][1] == [[0, ROWS[0]]]
    assert found["hub:someone/rows#test"][0] != fingerprint
    for name, said in {
        "hub:someone/rows#dev": 'Unknown split "dev". Should be one of',
        "hub:someone/absent": "RepositoryNotFoundError",
        "hub:someone/two": "available configs: ['main', 'other']",
        "hub:someone/broken": "because of ",
        "hub:someone/script": "Dataset scripts are no longer supported",
    }.items():
        path, _, split = name.partition("#")
        assert found[name].startswith(
            f"corpus.path={path}: no dataset with a split '{split or 'train'}' ("
        )
        assert said in found[name]
        assert "\n" not in found[name]
    assert "save one with `Dataset.save_to_disk`" in found["hub:someone/two"]


def test_offline_and_without_a_network(hub: Hub, tmp_path: Path) -> None:
    """What was fetched once is the same corpus offline; a new commit is another one."""
    online = ask("hub:someone/rows", home=tmp_path, address=hub.address)
    hub.commit = "c" * 40
    hub.repositories["someone/rows"]["train.jsonl"] = lines(*ROWS[:2])
    (tmp_path / "other").mkdir()
    newer = ask("hub:someone/rows", home=tmp_path / "other", address=hub.address)
    assert newer["hub:someone/rows"][1] == online["hub:someone/rows"][1][:2]
    assert newer["hub:someone/rows"][0] != online["hub:someone/rows"][0]
    nowhere = "http://127.0.0.1:1"
    names = ("hub:someone/rows", "hub:someone/absent")
    offline = ask(*names, home=tmp_path, address=nowhere, offline=True)
    assert offline["hub:someone/rows"] == online["hub:someone/rows"]
    assert "OfflineModeIsEnabled" in offline["hub:someone/absent"]
    refused = ask("hub:someone/rows", home=tmp_path, address=nowhere)["hub:someone/rows"]
    assert refused.startswith("corpus.path=hub:someone/rows: the hub cannot be reached (Connect")
    assert refused.endswith("or set HF_HUB_OFFLINE=1 to use what was fetched before")
