"""A model served by a cluster with token authentication: while a command runs, and after it."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from free_ports import free_ports
from ray_head import ROOT, Head, ray_head

openai = pytest.importorskip("openai", reason="its client comes with vLLM")
KEY = "0123456789abcdef-of-the-cluster"
START_S = 240.0  # on a machine that does much else
QUESTION = [{"role": "user", "content": "7+2-5+8+1-4="}]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """Its nodes have our package and the key, as an image and a secret give them."""
    with ray_head(PYTHONPATH=str(ROOT), PEAR_RAY_API_KEY=KEY) as started:
        yield started


def answer(port: int) -> str:
    """What the student says, through OpenAI's own client; empty where nobody answers there."""
    url = f"http://127.0.0.1:{port}/v1"
    try:
        chats = openai.OpenAI(base_url=url, api_key=KEY, max_retries=0).chat.completions
        [choice] = chats.create(
            model="student", messages=QUESTION, max_tokens=16, temperature=0
        ).choices
    except (openai.APIConnectionError, openai.NotFoundError, openai.InternalServerError):
        return ""
    return choice.message.content


def test_for_as_long_as_a_command_runs_and_after_it(head: Head, tmp_path: Path) -> None:
    [port] = free_ports(1)
    environment = head.environment | {"PEAR_RAY_API_KEY": KEY}
    order = ["serve", "embedded:student", "--port", str(port)]
    order += ["--address", f"127.0.0.1:{head.gcs}"]
    began = time.monotonic()
    server = subprocess.Popen(
        [sys.executable, "-m", "pear_ray", *order],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    head.started.append(server)
    said = [server.stdout.readline() for _ in range(3)]
    assert f"base URL: http://127.0.0.1:{port}/v1 (API key: asked for)\n" in said, (
        said + server.stdout.readlines()
    )
    print(f"up after {time.monotonic() - began:.1f} s")
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="x" * 16).models.list()
    while_it_runs = answer(port)
    assert len(while_it_runs) > 4
    server.send_signal(signal.SIGTERM)
    assert server.wait(timeout=60) == 0, server.stdout.read()
    assert answer(port) == ""  # its deployment is gone with it
    print(f"gone after {time.monotonic() - began:.1f} s")

    run(head, tmp_path, "-m", "pear_ray", *order, "--dry-run")
    serve = Path(sys.executable).with_name("serve")
    run(head, tmp_path, str(serve), "deploy", "serve.yaml", "--address", head.url)
    deadline = time.monotonic() + START_S
    while not (after_it := answer(port)):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    print(f"up again after {time.monotonic() - began:.1f} s")
    assert after_it == while_it_runs


def run(head: Head, folder: Path, *arguments: str) -> None:
    """A command of this environment's Python that ends, and well."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=head.environment | {"PEAR_RAY_API_KEY": KEY},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
