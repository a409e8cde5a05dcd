"""A real S3 server on this machine, for the tests that need one."""

import contextlib
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3

COLOURS = re.compile(r"\x1b\[[0-9;]*m")  # the server paints by status
SECRET = "a-secret-of-this-test"


@dataclass
class S3Server:
    """Its address, and a file with one line per request."""

    url: str
    log: Path
    process: subprocess.Popen[bytes]

    def client(self) -> Any:
        return boto3.client(
            "s3",
            endpoint_url=self.url,
            region_name="us-east-1",
            aws_access_key_id="a-key-of-this-test",
            aws_secret_access_key=SECRET,
        )

    def location(self, inside: str) -> str:
        """The URI of what is `inside` the server: a bucket, and maybe a folder."""
        return f"s3://{inside}?endpoint_override={self.url}&region=us-east-1"

    def post(self, path: str, body: bytes = b"") -> None:
        """Ask moto for what S3 cannot do, such as forgetting everything."""
        asked = urllib.request.Request(f"{self.url}/moto-api/{path}", data=body, method="POST")
        asked.add_header("Content-Type", "text/plain")
        urllib.request.urlopen(asked).close()

    def requests(self, since: int = 0) -> list[str]:
        """`PUT /bucket/name` and such, in order, from line `since` of the log."""
        lines = self.log.read_text(encoding="utf-8").splitlines()[since:]
        asked = [COLOURS.sub("", line.split('"')[1]) for line in lines if '"' in line]
        return [line.partition(" HTTP/")[0] for line in asked]

    def num_requests(self) -> int:
        return len(self.log.read_text(encoding="utf-8").splitlines())


@contextlib.contextmanager
def s3_server(folder: Path) -> Iterator[S3Server]:
    """A server in a process of its own, its log in `folder`.

    Of its own because it brings Flask, whose proxies fail when vLLM, starting later in this
    process, looks at all that is loaded.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / "s3-server.log"
    with log.open("wb") as written:
        moto = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            stdout=subprocess.DEVNULL,
            stderr=written,
        )
    deadline = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            break
        except OSError:
            assert moto.poll() is None, "the S3 server ended at once"
            assert time.monotonic() < deadline, "the S3 server did not start"
            time.sleep(0.1)
    try:
        yield S3Server(f"http://127.0.0.1:{port}", log, moto)
    finally:
        moto.terminate()
        moto.wait()


def credentials(folder: Path) -> dict[str, str]:
    """Environment with credentials of the test's; what this machine has is left alone."""
    return {
        "AWS_ACCESS_KEY_ID": "a-key-of-this-test",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(folder / "absent"),
        "AWS_SHARED_CREDENTIALS_FILE": str(folder / "absent"),
    }


OTHERS = ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")


def use_credentials(monkeypatch: Any, folder: Path) -> None:
    """Set them for one test."""
    for name, value in credentials(folder).items():
        monkeypatch.setenv(name, value)
    for name in OTHERS:
        monkeypatch.delenv(name, raising=False)


def environment(folder: Path) -> dict[str, str]:
    """That of a process with these credentials."""
    kept = {name: value for name, value in os.environ.items() if name not in OTHERS}
    return kept | credentials(folder)
