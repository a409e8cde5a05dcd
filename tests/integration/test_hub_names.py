"""`hub:NAME` end to end, with a stand-in for the hub on this machine: the few answers it needs."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

COMMIT = "a" * 40
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


def lines(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


class Hub(ThreadingHTTPServer):
    """Dataset repositories of small files, each at one commit."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.commit = COMMIT
        self.repositories: dict[str, dict[str, bytes]] = {
            "someone/rows": {"train.jsonl": lines(*ROWS), "test.jsonl": lines(ROWS[0])},
            "someone/two": {
                "README.md": TWO_CONFIGURATIONS.encode(),
                "main.jsonl": lines(ROWS[0]),
                "other.jsonl": lines(ROWS[1]),
            },
            "someone/broken": {"train.jsonl": b"{not json\n"},
            "someone/script": {"script.py": b"import datasets\n"},
        }

    @cached_property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answers(BaseHTTPRequestHandler):
    """What `huggingface_hub` asks for in order to load a dataset."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].strip("/")
        if path.startswith("api/"):
            self._describe(*path.split("/")[2:])
        else:
            _, user, name, _, _, file = path.split("/", 5)  # datasets/USER/NAME/resolve/COMMIT/FILE
            content = self.server.repositories.get(f"{user}/{name}", {}).get(file)
            if content is None:
                self._send(b"", status=404, X_Error_Code="EntryNotFound")
            else:
                self._send(content, ETag=f'"{hashlib.sha256(content).hexdigest()}"')

    do_HEAD = do_GET  # noqa: N815 - what the server calls

    def do_POST(self) -> None:
        """Which of some paths there are."""
        _, _, user, name, *_ = self.path.strip("/").split("/")
        asked = self.rfile.read(int(self.headers["Content-Length"])).decode()
        files = self._files(f"{user}/{name}")
        self._send_json([file for file in files if file["path"] in asked])

    def _describe(self, user: str, name: str, what: str = "", *_: str) -> None:
        repository = f"{user}/{name}"
        if repository not in self.server.repositories:
            self._send(b"", status=401, X_Error_Code="RepoNotFound")
        elif what == "tree":
            folders = self.path.partition("?")[0].count("/") > 6
            if folders:  # none has any
                self._send(b"", status=404, X_Error_Code="EntryNotFound")
            else:
                self._send_json(self._files(repository))
        else:
            siblings = [{"rfilename": file["path"]} for file in self._files(repository)]
            self._send_json({"id": repository, "sha": self.server.commit, "siblings": siblings})

    def _files(self, repository: str) -> list[dict[str, Any]]:
        return [
            {"type": "file", "path": path, "size": len(content), "oid": "b" * 40}
            for path, content in self.server.repositories[repository].items()
        ]

    def _send_json(self, tree: Any) -> None:
        self._send(json.dumps(tree).encode(), Content_Type="application/json")

    def _send(self, content: bytes, *, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", self.server.commit)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def ask(*names: str, home: Path, address: str, offline: bool = False) -> dict[str, Any]:
    """What the names come to, in a process of its own: fingerprint and rows, or the error."""
    done = subprocess.run(
        [sys.executable, "-c", ASK, *names],
        env=os.environ
        | {
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_DATASETS_CACHE": str(home / "datasets"),
            "HF_ENDPOINT": address,
            "HF_HUB_OFFLINE": str(int(offline)),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_TOKEN": "",
            "no_proxy": "127.0.0.1",
        },
        cwd=home,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
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
