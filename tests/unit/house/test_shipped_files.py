"""What the repository ships is what its own tools say: run files, generated page, command."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from pear_ray.config.run import load_run

ROOT = Path(__file__).parents[3]
RUN_FILES = sorted((ROOT / "jobs" / "runs").glob("*.yaml"))


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: path.stem)
def test_shipped_run_loads_and_is_named_after_its_file(path: Path) -> None:
    assert load_run(path).name == path.stem


def test_the_demo_is_shipped() -> None:
    assert ROOT / "jobs" / "runs" / "demo.yaml" in RUN_FILES


def check_docs(page: Path) -> int:
    script = (ROOT / "scripts" / "make_config_docs.py").read_text(encoding="utf-8")
    page.parent.joinpath("script.py").write_text(
        script.replace("Path(__file__).parents[1]", f"Path({str(page.parents[1])!r})"),
        encoding="utf-8",
    )
    command = [sys.executable, str(page.parent / "script.py"), "--check"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode


def test_configuration_page_is_current(tmp_path: Path) -> None:
    page = tmp_path / "docs" / "configuration.md"
    page.parent.mkdir()
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    page.write_text(text, encoding="utf-8")
    assert check_docs(page) == 0, "run `make docs`"
    page.write_text(text.replace("`gamma`", "`gama`"), encoding="utf-8")
    assert check_docs(page) == 1


def test_every_field_has_a_meaning_on_the_page() -> None:
    rows = [
        line.replace("\\|", "/")
        for line in (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| `")
    ]
    assert len(rows) > 50
    assert [row for row in rows if not row.split("|")[4].strip()] == []


def test_the_command_is_declared_and_importable() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["scripts"] == {"pear": "pear_ray.cli:main"}
    done = subprocess.run(
        [sys.executable, "-c", "from pear_ray.cli import main; main(['--help'])"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    assert "run" in done.stdout
