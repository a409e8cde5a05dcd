"""What the repository ships is what its own tools say: run files, generated page, command."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from pear_ray.config.run import load_run, read_tree
from pear_ray.config.study_plan import load_study

ROOT = Path(__file__).parents[3]
SHIPPED = sorted((ROOT / "jobs" / "runs").glob("*.yaml"))
STUDY_FILES = [path for path in SHIPPED if "base" in read_tree(path)]
RUN_FILES = [path for path in SHIPPED if path not in STUDY_FILES]


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: path.stem)
def test_shipped_run_loads_and_is_named_after_its_file(path: Path) -> None:
    assert load_run(path).name == path.stem


@pytest.mark.parametrize("path", STUDY_FILES, ids=lambda path: path.stem)
def test_shipped_study_loads_with_every_arm_and_is_named_after_its_file(path: Path) -> None:
    plan = load_study(path)
    assert plan.study.name == path.stem
    assert (path.parent / plan.study.base) in RUN_FILES


def test_what_must_be_shipped_is() -> None:
    assert {"demo", "paper_logic", "paper_math"} <= {path.stem for path in RUN_FILES}
    assert {"paper_logic_study", "paper_math_study"} <= {path.stem for path in STUDY_FILES}


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
