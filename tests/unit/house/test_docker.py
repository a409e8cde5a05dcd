"""The Dockerfiles copy what is there and end as a user; the health check tells a mute node."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
DOCKERFILES = sorted((ROOT / "docker").glob("Dockerfile.*"))


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda path: path.name)
def test_it_copies_what_is_there_and_ends_as_a_user(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    copied = [
        name
        for line in re.findall(r"^COPY (?!--from)(.+)$", text, flags=re.MULTILINE)
        for name in line.split()[:-1]
        if not name.startswith("--")
    ]
    assert {"pear_ray", "jobs", "docker/healthcheck.py"} <= set(copied)
    sdks = [f"docker/sdk/{name}.txt" for name in ("aws", "gcp", "azure")]
    assert all((ROOT / name).exists() for name in [*copied, *sdks] if "$" not in name)
    # The autoscaler runs in the head's container: it logs in to new machines and brings files.
    assert {"openssh-client", "rsync", "wget"} <= set(text.split())
    # A pin of the base, a number that a host can check, and a login shell that finds the venv.
    assert re.findall(r"^FROM \S+:(?!latest)\S*\d", text, flags=re.MULTILINE)
    assert re.findall(r"^USER (.+)$", text, flags=re.MULTILINE) == ["1000"]
    assert "/etc/profile.d/pear.sh" in text
    # Ray's launcher runs `docker run ... IMAGE bash`: an entry point would swallow it.
    assert "ENTRYPOINT" not in text
    assert "HEALTHCHECK" in text


@pytest.mark.parametrize("lock", ["cpu", "gpu"])
def test_what_it_leaves_out_is_in_the_lock(lock: str) -> None:
    text = (ROOT / "docker" / f"Dockerfile.{lock}").read_text(encoding="utf-8")
    [left_out] = re.findall(r"grep -vE '\^\((.+)\)=='", text)
    pins = (ROOT / "requirements" / f"{lock}.txt").read_text(encoding="utf-8")
    for name in left_out.split("|"):
        assert f"\n{name}==" in pins, name


def test_a_node_that_does_not_answer_is_not_well(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("healthcheck", ROOT / "docker/healthcheck.py")
    healthcheck = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(healthcheck)
    monkeypatch.setenv("RAY_AGENT_PORT", "1")  # nobody listens there
    raylet = [sys.executable, "-c", "open('/proc/self/comm', 'w').write('raylet'); input()"]
    with subprocess.Popen(raylet, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            named = Path(f"/proc/{process.pid}/comm")
            while named.read_text(encoding="utf-8").strip() != "raylet":
                assert process.poll() is None
            assert healthcheck.main() == 1
        finally:
            process.kill()
    assert "no answer from Ray's node at http://127.0.0.1:1/" in capsys.readouterr().err


@pytest.mark.parametrize("file", sorted((ROOT / "docker" / "sdk").glob("*.txt")), ids=str)
def test_a_providers_packages_are_pinned_and_agree_with_the_locks(file: Path) -> None:
    pins = re.findall(r"^([a-z0-9._-]+)==(\S+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    assert pins
    for lock in ("cpu", "gpu"):
        text = (ROOT / "requirements" / f"{lock}.txt").read_text(encoding="utf-8")
        locked = dict(re.findall(r"^([a-z0-9._-]+)==(\S+)", text, flags=re.MULTILINE))
        for name, version in pins:
            assert locked.get(name, version) == version
