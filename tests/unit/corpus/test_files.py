"""A corpus's files are found, named and recognised wherever they lie."""

import os
import shutil
from pathlib import Path

import by_hand
import pytest
from by_hand import corpus

from pear_ray.corpus.files import _content_hash, corpus_fingerprint, list_files
from pear_ray.errors import InputError

ROW = {"prompt": "1 + 2 =", "completion": "3"}


def listed(path: Path | str, **changes: str) -> list[tuple[str, str]]:
    return [(file.name, file.format) for file in list_files(corpus(path, **changes))]


def refusal(path: Path | str, **changes: str) -> str:
    with pytest.raises(InputError, match=r"^corpus\.path=") as caught:
        list_files(corpus(path, **changes))
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A folder with files of many kinds, two of one name, and what is no corpus."""
    folder = tmp_path / "a b"
    for name in ("b.parquet", "a.jsonl", "de/a.jsonl", "de/c.jsonl.gz", "en/x/d.ndjson.zst",
                 "e.arrow", "README.md", ".a.jsonl.swp", ".hidden.jsonl",
                 ".ipynb_checkpoints/a.jsonl"):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name, encoding="utf-8")
    return folder


ALL = [
    ("a.jsonl", "jsonl"),
    ("b.parquet", "parquet"),
    ("de/a.jsonl", "jsonl"),
    ("de/c.jsonl.gz", "jsonl"),
    ("e.arrow", "arrow"),
    ("en/x/d.ndjson.zst", "jsonl"),
]


def test_a_folder_is_listed_to_its_depth_and_sorted(mixed: Path) -> None:
    assert listed(mixed) == ALL
    assert listed(f"{mixed}/") == ALL


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.jsonl", ["a.jsonl"]),
        ("*", ["a.jsonl", "b.parquet", "e.arrow"]),
        ("?.jsonl", ["a.jsonl"]),
        ("[be].*", ["b.parquet", "e.arrow"]),
        ("*/*.jsonl*", ["de/a.jsonl", "de/c.jsonl.gz"]),
        ("**/a.jsonl", ["a.jsonl", "de/a.jsonl"]),
        ("d*/c.*", ["de/c.jsonl.gz"]),
    ],
)
def test_a_pattern_goes_step_by_step(mixed: Path, pattern: str, names: list[str]) -> None:
    assert [name for name, _ in listed(f"{mixed}/{pattern}")] == names


def test_a_step_before_the_pattern_is_no_part_of_the_names(mixed: Path) -> None:
    assert listed(f"{mixed}/de/*.jsonl") == [("a.jsonl", "jsonl")]


def test_a_name_that_looks_like_a_pattern(tmp_path: Path) -> None:
    (tmp_path / "[x]").mkdir()
    (tmp_path / "[x]" / "a.jsonl").touch()
    assert listed(tmp_path / "[x]") == [("a.jsonl", "jsonl")]
    assert listed(tmp_path / "[x]" / "a.jsonl") == [("a.jsonl", "jsonl")]


@pytest.mark.parametrize("tail", ["", "/", "/*", "/**/*"])
def test_a_uri_is_listed_as_whole_uris_with_its_query(mixed: Path, tail: str) -> None:
    """`file://` stands in for the object stores, whose URIs pyarrow reads in the same way."""
    root = mixed.as_uri()
    files = list_files(corpus(f"{root}{tail}?endpoint_override=http://localhost:9000"))
    wanted = [name for name, _ in ALL if tail != "/*" or "/" not in name]
    assert [file.name for file in files] == wanted
    assert [file.path for file in files] == [
        f"{root}/{name}?endpoint_override=http://localhost:9000" for name in wanted
    ]


def test_a_listed_uri_can_be_read(tmp_path: Path) -> None:
    folder = tmp_path / "a b#c"
    folder.mkdir()
    by_hand.jsonl(folder / "x y%.jsonl", [ROW])
    for path in (folder.as_uri(), f"{folder.as_uri()}/*.jsonl", (folder / "x y%.jsonl").as_uri()):
        assert by_hand.rows_of(corpus(path)) == [("x y%.jsonl", 1, ROW)]


def test_a_file_with_a_query_is_known_by_its_name(mixed: Path) -> None:
    uri = f"{(mixed / 'a.jsonl').as_uri()}?endpoint_override=http://localhost:9000"
    assert listed(uri) == [("a.jsonl", "jsonl")]


def test_a_relative_path_becomes_one_for_every_process(
    mixed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(mixed)
    for path, name in (("a.jsonl", "a.jsonl"), ("./de", "de/a.jsonl"), ("*.jsonl", "a.jsonl")):
        assert list_files(corpus(path))[0].path == str(mixed / name)
    monkeypatch.setenv("HOME", str(mixed))
    assert list_files(corpus("~/a.jsonl"))[0].path == str(mixed / "a.jsonl")


def test_a_format_that_was_said_is_believed(mixed: Path) -> None:
    assert listed(mixed / "README.md", format="jsonl") == [("README.md", "jsonl")]
    assert listed(f"{mixed}/*.md", format="parquet") == [("README.md", "parquet")]


def test_what_is_not_there(mixed: Path) -> None:
    assert "no such file or folder" in refusal(mixed / "absent.jsonl")
    assert "no such file or folder" in refusal(f"{mixed}/absent/*.jsonl")
    assert "no such file or folder" in refusal((mixed / "absent").as_uri())
    assert "its ending is none of .jsonl" in refusal(mixed / "README.md")
    assert "holds no corpus file" in refusal(f"{mixed}/*.md")
    assert "cannot be listed" in refusal(f"{mixed}/de/a.jsonl/*")
    (mixed / "empty").mkdir()
    assert "holds no corpus file" in refusal(mixed / "empty")
    assert "cannot be opened" in refusal("nowhere://bucket/x")


def test_a_hub_name_needs_no_file() -> None:
    assert listed("hub:someone/rows") == [("someone/rows", "hub")]
    assert listed("someone/rows", format="hub") == [("someone/rows", "hub")]


def test_a_saved_dataset_is_one_file_named_by_its_split(tmp_path: Path) -> None:
    by_hand.saved(tmp_path / "one", [ROW])
    by_hand.saved_splits(tmp_path / "two", [ROW])
    assert listed(tmp_path / "one") == [("train", "saved")]
    assert listed(tmp_path / "two", split="test") == [("test", "saved")]


def test_the_fingerprint_is_of_rows_and_not_of_their_place(tmp_path: Path) -> None:
    folder = tmp_path / "one"
    folder.mkdir()
    by_hand.jsonl(folder / "a.jsonl", [ROW, ROW])
    by_hand.jsonl(folder / "b.jsonl", [ROW])
    before = corpus_fingerprint(corpus(folder))
    moved = folder.rename(tmp_path / "two")
    assert corpus_fingerprint(corpus(moved)) == before
    assert corpus_fingerprint(corpus(f"{moved}/*")) == before
    os.utime(moved / "a.jsonl", (1, 1))
    assert corpus_fingerprint(corpus(moved)) == before
    by_hand.jsonl(moved / "b.jsonl", [ROW | {"completion": "4"}])  # as many bytes as before
    assert corpus_fingerprint(corpus(moved)) != before


def test_a_row_that_moves_to_the_next_file_is_another_corpus(tmp_path: Path) -> None:
    by_hand.jsonl(tmp_path / "a.jsonl", [ROW, ROW])
    by_hand.jsonl(tmp_path / "b.jsonl", [ROW])
    before = corpus_fingerprint(corpus(tmp_path))
    by_hand.jsonl(tmp_path / "a.jsonl", [ROW])
    by_hand.jsonl(tmp_path / "b.jsonl", [ROW, ROW])
    assert corpus_fingerprint(corpus(tmp_path)) != before


def test_a_huge_file_is_known_by_size_and_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pear_ray.corpus.files.HASHED_BYTES", 0)
    path = tmp_path / "a.jsonl"
    by_hand.jsonl(path, [ROW])
    before = corpus_fingerprint(corpus(path))
    assert corpus_fingerprint(corpus(path)) == before
    os.utime(path, (1, 1))
    assert corpus_fingerprint(corpus(path)) != before


def test_the_fingerprint_of_a_saved_dataset(tmp_path: Path) -> None:
    by_hand.saved(tmp_path / "one", [ROW])
    before = corpus_fingerprint(corpus(tmp_path / "one"))
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    assert corpus_fingerprint(corpus(tmp_path / "copy")) == before
    by_hand.saved(tmp_path / "two", [ROW | {"completion": "4"}])
    assert corpus_fingerprint(corpus(tmp_path / "two")) != before


def test_a_file_that_cannot_be_opened_has_a_hash_of_its_own(tmp_path: Path) -> None:
    by_hand.jsonl(tmp_path / "a.jsonl", [ROW])
    closed, absent = _content_hash(tmp_path), _content_hash(tmp_path / "absent")
    assert len({closed, absent, _content_hash(tmp_path / "a.jsonl")}) == 3
