"""No file of cluster/ or docker/ holds a secret, whatever it is called."""

import re
from pathlib import Path

import pytest

from pear_ray.clusters.launcher_checks import SECRET

ROOT = Path(__file__).parents[3]
FILES = sorted(
    path
    for folder in ("cluster", "docker")
    for path in (ROOT / folder).rglob("*")
    if path.is_file()
)
# Keys whose form gives them away: AWS, GitHub, Hugging Face, W&B, Slack, Google, a private key.
KEY = re.compile(
    r"AKIA[0-9A-Z]{16}|gh[pousr]_[0-9A-Za-z]{36}|hf_[A-Za-z]{30,}|\b[0-9a-f]{40}\b|xox[abp]-|"
    r"AIza[0-9A-Za-z_-]{35}|PRIVATE KEY"
)


@pytest.mark.parametrize("file", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_it_holds_none(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert not KEY.search(text)
    found = [name for name in SECRET.findall(text) if not name.endswith("_PATH")]
    # What a comment tells people to type names a file, not a value.
    assert found == []


def test_the_patterns_see_what_they_are_for() -> None:
    assert SECRET.findall("-e HF_TOKEN=abc WANDB_API_KEY='x'") == ["HF_TOKEN", "WANDB_API_KEY"]
    assert SECRET.findall('export AWS_SECRET_ACCESS_KEY="$AWS_SECRET_ACCESS_KEY"') == []
    assert KEY.search("AKIA" + "A" * 16)
