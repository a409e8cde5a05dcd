"""No module outgrows one sitting, no function one screen."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
MAX_MODULE_LINES = 400
MAX_FUNCTION_LINES = 60
MODULES = sorted(path for folder in ("pear_ray", "jobs") for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_module_stays_within_budget(module: Path) -> None:
    source = module.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= MAX_MODULE_LINES
    too_long = {
        node.name: (node.end_lineno or 0) - node.lineno + 1
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or 0) - node.lineno + 1 > MAX_FUNCTION_LINES
    }
    assert too_long == {}


def test_the_budget_looks_at_the_package() -> None:
    assert ROOT / "pear_ray" / "config" / "run.py" in MODULES
