"""A stand-in for the hub on this machine, with the few answers that loading a dataset needs."""

import hashlib
import json
import os
import subprocess
import sys
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "a" * 40


def lines(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


class Hub(ThreadingHTTPServer):
    """Dataset repositories of small files, each at one commit."""

    def __init__(self, repositories: dict[str, dict[str, bytes]]) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.commit = COMMIT
        self.repositories = repositories

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


def in_a_process(
    script: str, *arguments: str, home: Path, address: str, offline: bool = False
) -> subprocess.CompletedProcess[str]:
    """`script` in a process of its own: the libraries read addresses and switches on import."""
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
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
