"""Names of hub datasets, and datasets that cannot be opened, without a network."""

from pathlib import Path

import pytest
from by_hand import corpus

from pear_ray.corpus.files import corpus_fingerprint, list_files
from pear_ray.corpus.saved import open_dataset
from pear_ray.errors import InputError


def refusal(path: str) -> str:
    with pytest.raises(InputError) as caught:
        list_files(corpus(path))
    assert str(caught.value).startswith(f"corpus.path={path}: ")
    return str(caught.value)


@pytest.mark.parametrize(
    "name", ["", "a b/c", "a/b/c", "/a", "a/", "someone/rows@main", "s3://a/b"]
)
def test_what_names_no_dataset_of_the_hub(name: str) -> None:
    assert f"{name!r} names no dataset of the hub; give hub:USER/NAME" in refusal(f"hub:{name}")


def test_a_folder_here_is_not_taken_for_a_name_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "someone" / "rows").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert f"is here as well ({tmp_path}/someone/rows)" in refusal("hub:someone/rows")


def test_a_hub_name_that_was_never_fetched_when_offline() -> None:
    """As all tests are, by HF_HUB_OFFLINE."""
    with pytest.raises(InputError) as caught:
        corpus_fingerprint(corpus("hub:someone/never-fetched"))
    assert str(caught.value).startswith("corpus.path=hub:someone/never-fetched: no dataset with a")
    assert "OfflineModeIsEnabled" in str(caught.value)
    assert "HF_HUB_OFFLINE" in str(caught.value)


def test_a_folder_that_no_dataset_was_saved_to_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("{", encoding="utf-8")
    (tmp_path / "dataset_info.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match="JSONDecodeError: Expecting"):
        open_dataset(str(tmp_path), "saved", "train")
