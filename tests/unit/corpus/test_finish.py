"""A corpus of several parts, with faults planted: exact counts, and the same after any kill."""

import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import by_hand
import pyarrow.parquet as pq
import pytest
from by_hand import corpus

from pear_ray.artifacts.tables import CORPUS, QUARANTINE, read_table
from pear_ray.corpus.finish import finish, preview
from pear_ray.corpus.parts import Part, find_parts
from pear_ray.corpus.prepare import PartSummary, PrepareJob, is_prepared, prepare_part, read_summary
from pear_ray.errors import InputError

USER = {"role": "user", "content": "a"}


def good(example_id: str | None = None, **more: Any) -> dict[str, Any]:
    return {"id": example_id, "token_ids": [5, 6, 7], "loss_mask": [False, True, True]} | more


def job_of(student: Path, folder: Path, path: Path | str, **changes: Any) -> PrepareJob:
    return PrepareJob(
        corpus=corpus(path, **changes), model=student, max_model_len=8, folder=folder / "collect"
    )


def prepared(job: PrepareJob) -> list[Part]:
    parts = find_parts(job.corpus)
    for part in parts:
        prepare_part(part, job)
    return parts


def lines(path: Path, rows: Sequence[Any]) -> None:
    text = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(f"{line}\n" for line in text), encoding="utf-8")


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.fixture
def planted(tmp_path: Path, student: Path) -> PrepareJob:
    """Three parts, six rows to a part: two of `a.jsonl`, one of `b.jsonl`."""
    folder = tmp_path / "rows"
    folder.mkdir()
    lines(
        folder / "a.jsonl",
        [
            good("one"),
            "{not json",
            good("two", source="other", is_negative=True),
            good("one"),  # again, within the part
            {"prompt": 3, "completion": "b"},
            good(),
            # the second part
            good("two"),  # again, in the next part
            "",
            {"messages": []},
            {"messages": [{"role": "bot", "content": "a"}]},
            {"messages": [USER]},
            good("three", token_ids=[5, 6, 10**9]),
        ],
    )
    lines(
        folder / "b.jsonl",
        [
            good("three"),  # the first good one of its name
            good("four", token_ids=[5] * 9, loss_mask=[True] * 9),
            good("five", behavior_logprobs=[-1.0, 2.0]),
            good("one"),  # again, in another file
            good(),
            good("six", behavior_logprobs=[-1.0, -2.0]),
        ],
    )
    return job_of(student, tmp_path, folder, rows_per_part=6, max_bad_fraction=0.75)


COUNTS = {
    "unreadable": 1,
    "duplicate_id": 3,
    "wrong_type": 1,
    "empty": 1,
    "bad_roles": 1,
    "no_trainable_token": 1,
    "id_out_of_vocabulary": 1,
    "too_long": 1,
    "bad_logprobs": 1,
}


def test_exact_counts(planted: PrepareJob) -> None:
    parts = prepared(planted)
    assert [part.name for part in parts] == ["a.jsonl", "a.jsonl", "b.jsonl"]
    assert finish(parts, planted) == PartSummary(
        rows=6,
        tokens=18,
        loss_tokens=12,
        negatives=1,
        bad=Counter(COUNTS),
        sources=Counter(corpus=5, other=1),
    )


def test_the_rows_that_are_kept_and_their_order(planted: PrepareJob) -> None:
    """Each part's file is there, though nothing of the second part can be used."""
    finish(prepared(planted), planted)
    names = [
        read_table(planted.rows_file(index), CORPUS)["example_id"].to_pylist() for index in range(3)
    ]
    assert names == [["one", "two", "a.jsonl:6"], [], ["three", "b.jsonl:5", "six"]]
    last = read_table(planted.rows_file(2), CORPUS).to_pylist()[2]
    assert last == {
        "example_id": "six",
        "source": "corpus",
        "is_negative": False,
        "token_ids": [5, 6, 7],
        "loss_mask": [False, True, True],
        "problem_id": None,
        "file": f"{planted.corpus.path}/b.jsonl",
        "row": 6,
        "messages": None,
        "given_logprobs": [0.0, -1.0, -2.0],
    }


def test_every_bad_row_is_named(planted: PrepareJob) -> None:
    finish(prepared(planted), planted)
    table = read_table(planted.folder / "quarantine.parquet", QUARANTINE).to_pylist()
    a, b = f"{planted.corpus.path}/a.jsonl", f"{planted.corpus.path}/b.jsonl"
    assert [(row["file"], row["row"], row["field"], row["reason"]) for row in table] == [
        (a, 2, "", "unreadable"),
        (a, 5, "prompt", "wrong_type"),
        (a, 4, "id", "duplicate_id"),
        (a, 9, "messages", "empty"),
        (a, 10, "messages.0.role", "bad_roles"),
        (a, 11, "messages", "no_trainable_token"),
        (a, 12, "token_ids", "id_out_of_vocabulary"),
        (a, 7, "id", "duplicate_id"),
        (b, 2, "", "too_long"),
        (b, 3, "behavior_logprobs", "bad_logprobs"),
        (b, 4, "id", "duplicate_id"),
    ]
    assert [row["detail"] for row in table if row["reason"] == "duplicate_id"] == [
        f"'one' is the id of row 1 of {a} already",
        f"'two' is the id of row 3 of {a} already",
        f"'one' is the id of row 1 of {a} already",
    ]


def test_rows_that_were_cut_are_counted(tmp_path: Path, student: Path) -> None:
    """At 8 tokens; the first of a row never trains, whatever its mask says."""
    long = {"token_ids": [5] * 9, "loss_mask": [True] * 9}
    path = tmp_path / "rows.jsonl"
    lines(path, [good("one", **long), good("two", **long), good("three"), good("three")])
    job = job_of(student, tmp_path, path, too_long="cut", max_bad_fraction=0.25)
    total = finish(prepared(job), job)
    assert (total.rows, total.cut, total.tokens, total.loss_tokens) == (3, 2, 8 + 8 + 3, 7 + 7 + 2)


def left_behind(job: PrepareJob) -> dict[str, Any]:
    """What everything that a later stage reads says."""
    files = sorted(job.folder.rglob("*.parquet"))
    return {
        str(file.relative_to(job.folder)): pq.read_table(file).to_pylist() for file in files
    } | {file.name: read_summary(file) for file in sorted(job.folder.rglob("*.json"))}


def test_finishing_twice_is_finishing_once(planted: PrepareJob) -> None:
    parts = prepared(planted)
    total, files = finish(parts, planted), left_behind(planted)
    assert finish(parts, planted) == total
    assert left_behind(planted) == files


class Killed(BaseException):
    """What no code catches."""


def killed_at(number: int, patch: pytest.MonkeyPatch) -> None:
    """Die instead of putting the `number`th file in its place."""
    replace, calls = Path.replace, iter(range(1, 1000))

    def counted(path: Path, target: Path) -> Path:
        if next(calls) == number:
            raise Killed
        return replace(path, target)

    patch.setattr(Path, "replace", counted)


def test_killed_before_any_write_finishing_goes_on(tmp_path: Path, planted: PrepareJob) -> None:
    parts = prepared(planted)
    shutil.copytree(planted.folder, tmp_path / "before")
    total, files = finish(parts, planted), left_behind(planted)
    number_of_kills = 0
    while True:
        job = dataclasses.replace(planted, folder=tmp_path / f"killed-{number_of_kills}")
        shutil.copytree(tmp_path / "before", job.folder)
        with pytest.MonkeyPatch.context() as patch:
            killed_at(number_of_kills + 1, patch)
            try:
                finish(parts, job)
            except Killed:
                number_of_kills += 1
            else:
                break
        assert finish(parts, job) == total
        assert left_behind(job) == files
    assert number_of_kills == 3 * 3 + 1  # three files of each part, and the whole quarantine


def test_killed_before_any_write_preparing_does_the_part_again(
    tmp_path: Path, planted: PrepareJob
) -> None:
    part = find_parts(planted.corpus)[0]
    for number in (1, 2, 3):
        job = dataclasses.replace(planted, folder=tmp_path / f"killed-{number}")
        with pytest.MonkeyPatch.context() as patch:
            killed_at(number, patch)
            with pytest.raises(Killed):
                prepare_part(part, job)
        assert not job.summary_file(0).exists()
        prepare_part(part, job)
        prepare_part(part, planted)
        assert left_behind(job) == left_behind(planted)


@pytest.fixture
def spoiled(tmp_path: Path) -> Path:
    """A good file among three that cannot be read."""
    folder = tmp_path / "rows"
    folder.mkdir()
    lines(folder / "a.jsonl", [good("one"), good("two")])
    by_hand.parquet(folder / "b.parquet", [good("three")])
    by_hand.packed_jsonl(folder / "c.jsonl.gz", [good("four")])
    lines(folder / "d.jsonl", [good("five")])
    lines(folder / "e.jsonl", [good("six")])
    half(folder / "b.parquet")
    half(folder / "c.jsonl.gz")
    return folder


def test_files_that_cannot_be_read_stop_the_run_at_its_end(
    tmp_path: Path, student: Path, spoiled: Path
) -> None:
    job = job_of(student, tmp_path, spoiled)
    parts = find_parts(job.corpus)
    (spoiled / "d.jsonl").unlink()
    for part in parts:
        prepare_part(part, job)
    with pytest.raises(InputError, match="3 files cannot be read; mend or remove") as caught:
        finish(parts, job)
    told = str(caught.value).splitlines()[1:]
    assert [line.split(": ")[0] for line in told] == [
        f"  {spoiled}/{name}" for name in ("b.parquet", "c.jsonl.gz", "d.jsonl")
    ]
    table = read_table(job.folder / "quarantine.parquet", QUARANTINE).to_pylist()
    assert [(row["file"], row["row"], row["field"], row["reason"]) for row in table] == [
        (f"{spoiled}/{name}", None, "", "unreadable")
        for name in ("b.parquet", "c.jsonl.gz", "d.jsonl")
    ]
    assert read_table(job.rows_file(4), CORPUS)["example_id"].to_pylist() == ["six"]


def test_files_that_cannot_be_read_are_left_out(
    tmp_path: Path, student: Path, spoiled: Path
) -> None:
    job = job_of(student, tmp_path, spoiled, unreadable_files="skip", max_bad_fraction=0)
    total = finish(prepared(job), job)
    assert (total.rows, total.num_bad) == (4, 0)
    assert list(total.unreadable) == [f"{spoiled}/b.parquet", f"{spoiled}/c.jsonl.gz"]


def test_a_file_that_was_mended_is_read_by_the_next_attempt(
    tmp_path: Path, student: Path, spoiled: Path
) -> None:
    """The corpus's bytes may be the same: a mount was away, or a permission."""
    job = job_of(student, tmp_path, spoiled)
    (spoiled / "b.parquet").unlink()
    (spoiled / "c.jsonl.gz").unlink()
    parts = find_parts(job.corpus)
    away = (spoiled / "d.jsonl").rename(tmp_path / "away")
    for part in parts:
        prepare_part(part, job)
    with pytest.raises(InputError, match="1 files cannot be read"):
        finish(parts, job)
    away.rename(spoiled / "d.jsonl")
    again = [part for part in parts if not is_prepared(part, job)]
    assert [part.name for part in again] == ["d.jsonl"]
    prepare_part(again[0], job)
    assert finish(parts, job).rows == 4
    assert (job.folder / "quarantine.parquet").exists()


def test_a_broken_off_file_keeps_what_was_read_of_it(tmp_path: Path, student: Path) -> None:
    """And is no bad row, though the part's rows are counted again for its repeated id."""
    path = tmp_path / "rows.arrow"
    by_hand.arrow_stream(path, [good(each) for each in ("one", "one", "two", "three", "four")])
    path.write_bytes(path.read_bytes()[:-40])
    job = job_of(student, tmp_path, path, unreadable_files="skip", max_bad_fraction=0.25)
    total = finish(prepared(job), job)
    assert (total.rows, dict(total.bad)) == (3, {"duplicate_id": 1})
    assert list(total.unreadable) == [str(path)]
    table = read_table(job.folder / "quarantine.parquet", QUARANTINE).to_pylist()
    assert [(row["row"], row["reason"]) for row in table] == [
        (None, "unreadable"),
        (2, "duplicate_id"),
    ]


def test_only_unreadable_files_are_no_corpus(tmp_path: Path, student: Path) -> None:
    by_hand.parquet(tmp_path / "a.parquet", [good("one")])
    half(tmp_path / "a.parquet")
    job = job_of(student, tmp_path, tmp_path / "a.parquet", unreadable_files="skip")
    with pytest.raises(InputError, match=r"is empty; .* \(1 files cannot be read\)"):
        finish(prepared(job), job)


@pytest.mark.parametrize(
    ("num_bad", "num_rows", "allowed"),
    [(29, 100, 0.29), (7, 100, 0.07), (1, 3, 1 / 3), (0, 5, 0.0), (4, 5, 0.8)],
)
def test_the_share_of_bad_rows_may_be_just_what_is_allowed(
    tmp_path: Path, student: Path, num_bad: int, num_rows: int, allowed: float
) -> None:
    path = tmp_path / "rows.jsonl"
    lines(path, ["{"] * num_bad + [good()] * (num_rows - num_bad))
    job = job_of(student, tmp_path, path, max_bad_fraction=allowed)
    assert finish(prepared(job), job).num_bad == num_bad
    preview(find_parts(job.corpus), job)
    if num_bad:
        stricter = dataclasses.replace(job, corpus=corpus(path, max_bad_fraction=allowed - 0.001))
        for refuse in (finish, preview):
            with pytest.raises(InputError, match=f"{num_bad} of {num_rows} rows cannot be used"):
                refuse(find_parts(job.corpus), stricter)


def test_a_refusal_counts_reasons_and_shows_the_first_ten(tmp_path: Path, student: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines(path, [good("x"), good("x"), *["{"] * 12])
    job = job_of(student, tmp_path, path)
    for refuse, more in (
        (preview, "among the rows looked at"),
        (finish, f"all of them are in {job.folder}/quarantine.parquet"),
    ):
        parts = prepared(job) if refuse is finish else find_parts(job.corpus)
        with pytest.raises(InputError) as caught:
            refuse(parts, job)
        told = str(caught.value).splitlines()
        assert told[0] == (
            f"corpus.path={path}: 13 of 14 rows cannot be used, more than "
            "corpus.max_bad_fraction=0.01 allows (never all of them); mend or remove them, or "
            "raise it"
        )
        assert told[1:4] == [
            "        12 unreadable",
            "         1 duplicate_id",
            f"the first ({more}):",
        ]
        assert len(told) == 4 + 10
        shown = f"  {path} row 3: not valid JSON: Expecting property name"
        assert any(line.startswith(shown) for line in told)


@pytest.mark.parametrize("fraction", [0.01, 1.0])
def test_no_good_row_is_no_corpus(tmp_path: Path, student: Path, fraction: float) -> None:
    path = tmp_path / "rows.jsonl"
    lines(path, ["{"] * 3)
    job = job_of(student, tmp_path, path, max_bad_fraction=fraction)
    for refuse in (preview, finish):
        with pytest.raises(InputError, match="3 of 3 rows cannot be used"):
            refuse(prepared(job), job)


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_an_empty_corpus(tmp_path: Path, student: Path, text: str) -> None:
    (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8")
    job = job_of(student, tmp_path, tmp_path / "rows.jsonl")
    for refuse in (preview, finish):
        with pytest.raises(InputError, match=r"the corpus is empty; it needs at least one row$"):
            refuse(prepared(job), job)


def test_a_preview_of_a_good_corpus_writes_nothing(tmp_path: Path, student: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines(path, [good()] * 1200)
    job = job_of(student, tmp_path, path, rows_per_part=500)
    preview(find_parts(job.corpus), job)
    assert [each.name for each in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_preview_leaves_bad_luck_to_the_end_and_refuses_the_hopeless(
    tmp_path: Path, student: Path
) -> None:
    """Of the first thousand rows 500 may be bad: the rest may be good."""
    path = tmp_path / "rows.jsonl"
    job = job_of(student, tmp_path, path)
    lines(path, ["{"] * 500 + [good()] * 700)
    preview(find_parts(job.corpus), job)
    lines(path, ["{"] * 501 + [good()] * 700)
    with pytest.raises(InputError, match=r"501 of 100[01] rows cannot be used"):
        preview(find_parts(job.corpus), job)


def test_a_preview_names_a_file_that_cannot_be_planned(
    tmp_path: Path, student: Path, spoiled: Path
) -> None:
    lines(spoiled / "a.jsonl", [good()] * 1200)
    job = job_of(student, tmp_path, spoiled)
    with pytest.raises(InputError, match=r"1 files cannot be read.*\n  .*b\.parquet: ArrowInvalid"):
        preview(find_parts(job.corpus), job)
    skipping = job_of(student, tmp_path, spoiled, unreadable_files="skip")
    preview(find_parts(job.corpus), skipping)


FORMATS = [by_hand.jsonl, by_hand.packed_jsonl, by_hand.parquet, by_hand.arrow_file,
           by_hand.arrow_stream, by_hand.saved, by_hand.saved_splits]  # fmt: skip
ENDINGS = ["rows.jsonl", "rows.jsonl.gz", "rows.parquet", "a.arrow", "b.arrow", "one", "two"]


@pytest.mark.parametrize(("write", "name"), list(zip(FORMATS, ENDINGS, strict=True)))
def test_every_format_makes_the_same_examples(
    tmp_path: Path, student: Path, write: Any, name: str
) -> None:
    """A missing key of JSON is a null of a column."""
    turns = [USER, {"role": "assistant", "content": "b"}]
    text = {"id": "three", "messages": turns, "token_ids": None, "loss_mask": None}
    rows = [
        good("one", behavior_logprobs=[-1.0, -2.0], messages=None),
        good("two", behavior_logprobs=None, messages=None),
        text | {"behavior_logprobs": [-0.5, -0.25]},
    ]
    write(tmp_path / name, rows)
    job = job_of(student, tmp_path, tmp_path / name)
    parts = prepared(job)
    assert finish(parts, job).rows == 3
    found = [
        row for part in parts for row in read_table(job.rows_file(part.index), CORPUS).to_pylist()
    ]
    assert [row["example_id"] for row in found] == ["one", "two", "three"]
    assert [row["row"] for row in found] == [1, 2, 3]
    assert [row["token_ids"] for row in found[:2]] == [[5, 6, 7]] * 2
    assert [row["loss_mask"] for row in found] == [
        [False, True, True],
        [False, True, True],
        [False, False, False, False, True, True],
    ]
    assert [row["given_logprobs"] for row in found] == [
        [0.0, -1.0, -2.0],
        None,
        [0.0, 0.0, 0.0, 0.0, -0.5, -0.25],
    ]
    assert json.loads(found[2]["messages"]) == turns
