"""A corpus on S3, here a server of that protocol on this machine, is what it is in a folder."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from s3_server import SECRET, s3_server, use_credentials

from pear_ray.artifacts.tables import CORPUS, QUARANTINE, read_table
from pear_ray.config.corpus import DatasetCorpus
from pear_ray.corpus.files import corpus_fingerprint, list_files
from pear_ray.corpus.finish import finish
from pear_ray.corpus.parts import find_parts
from pear_ray.corpus.prepare import PartSummary, PrepareJob, prepare_part
from pear_ray.embedded.paths import embedded_path
from pear_ray.errors import InputError

NAMES = ["a.jsonl", "b.jsonl.gz", "c.parquet", "d.arrow", "de/e f#1%+é.jsonl"]
BAD_LINE = "{not json"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an S3 server in a process of its own."""
    with s3_server(tmp_path_factory.mktemp("s3")) as running:
        yield running.url


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What this machine has for a real store is left alone."""
    use_credentials(monkeypatch, tmp_path)


@pytest.fixture
def client(server: str) -> Any:
    """A client of the server, whose buckets are gone when the test is over."""
    client = boto3.client("s3", endpoint_url=server, region_name="us-east-1")
    client.create_bucket(Bucket="rows")
    return client


@pytest.fixture(autouse=True)
def emptied(server: str) -> Iterator[None]:
    yield
    request(server, "reset")


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with a file of every kind, a row that is bad, and what is no corpus."""
    folder = tmp_path / "rows"
    (folder / "de").mkdir(parents=True)
    text = [json.dumps(row) + "\n" for row in rows(0, 5)]
    (folder / "a.jsonl").write_text("".join([*text[:3], BAD_LINE + "\n", *text[3:]]))
    packed = "".join(json.dumps(row) + "\n" for row in rows(5, 8))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(packed.encode(), mtime=0))
    pq.write_table(pa.Table.from_pylist(rows(8, 13)), folder / "c.parquet", row_group_size=2)
    table = pa.Table.from_pylist(rows(13, 16))
    with pa.ipc.new_file(str(folder / "d.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    (folder / NAMES[-1]).write_text(json.dumps(rows(16, 17)[0]))
    (folder / ".hidden.jsonl").write_text(text[0])
    (folder / "README.md").write_text("no corpus")
    return folder


def rows(begin: int, end: int) -> list[dict[str, Any]]:
    return [{"prompt": f"{n} + 1 =", "completion": str(n + 1)} for n in range(begin, end)]


def upload(client: Any, folder: Path, prefix: str, *, bucket: str = "rows") -> None:
    """The files as objects, and an empty object for the folder itself, as web consoles make one."""
    client.put_object(Bucket=bucket, Key=f"{prefix}/", Body=b"")
    for file in folder.rglob("*"):
        if file.is_file():
            key = f"{prefix}/{file.relative_to(folder).as_posix()}"
            client.put_object(Bucket=bucket, Key=key, Body=file.read_bytes())


def request(server: str, path: str, body: bytes = b"") -> None:
    import urllib.request

    asked = urllib.request.Request(f"{server}/moto-api/{path}", data=body, method="POST")
    asked.add_header("Content-Type", "text/plain")
    urllib.request.urlopen(asked).close()


def corpus(path: Path | str, **changes: Any) -> DatasetCorpus:
    tree = {"kind": "dataset", "path": str(path), "rows_per_part": 2, "max_bad_fraction": 0.5}
    return DatasetCorpus.model_validate(tree | changes)


def prepared(
    wanted: DatasetCorpus, folder: Path
) -> tuple[PartSummary, list[dict[str, Any]], list[dict[str, Any]]]:
    """Summary, examples and bad rows; files are called by their names alone."""
    job = PrepareJob(corpus=wanted, model=embedded_path("student"), max_model_len=96, folder=folder)
    parts = find_parts(wanted)
    for part in parts:
        prepare_part(part, job)
    summary = finish(parts, job)
    names = {part.file: part.name for part in parts}
    kept = [
        row | {"file": names[row["file"]]}
        for part in parts
        for row in read_table(job.rows_file(part.index), CORPUS).to_pylist()
    ]
    bad = read_table(folder / "quarantine.parquet", QUARANTINE).to_pylist()
    return summary, kept, [row | {"file": names[row["file"]]} for row in bad]


def refusal(path: str) -> str:
    with pytest.raises(InputError, match=r"^corpus\.path=s3://") as caught:
        corpus_fingerprint(corpus(path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("tail", ["", "/", "/**"])
def test_rows_and_bad_rows_are_those_of_the_folder(
    client: Any, server: str, here: Path, tmp_path: Path, tail: str
) -> None:
    upload(client, here, "a folder")
    uri = f"s3://rows/a%20folder{tail}?endpoint_override={server}&region=us-east-1"
    summary, kept, bad = prepared(corpus(uri), tmp_path / "remote")
    assert [row["example_id"] for row in kept] == [
        *("a.jsonl:1", "a.jsonl:2", "a.jsonl:3", "a.jsonl:5", "a.jsonl:6"),
        *(f"b.jsonl.gz:{n}" for n in (1, 2, 3)),
        *(f"c.parquet:{n}" for n in (1, 2, 3, 4, 5)),
        *(f"d.arrow:{n}" for n in (1, 2, 3)),
        f"{NAMES[-1]}:1",
    ]
    assert [(row["file"], row["row"], row["reason"]) for row in bad] == [
        ("a.jsonl", 4, "unreadable")
    ]
    assert (summary, kept, bad) == prepared(corpus(here), tmp_path / "local")
    assert SECRET not in str((summary, kept, bad))


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("rows/top/*.jsonl", ["a.jsonl"]),
        ("rows/top/*/*", [NAMES[-1]]),
        ("rows/top/[cd].*", ["c.parquet", "d.arrow"]),
        ("rows/top/c.parquet", ["c.parquet"]),
        ("rows/top/de/e%20f%231%25%2B%C3%A9.jsonl", ["e f#1%+é.jsonl"]),
        ("rows", [f"top/{name}" for name in NAMES]),
        ("rows/**/*.arrow", ["top/d.arrow"]),
    ],
)
def test_patterns_and_single_objects(
    client: Any, server: str, here: Path, path: str, names: list[str]
) -> None:
    upload(client, here, "top")
    found = list_files(corpus(f"s3://{path}?endpoint_override={server}"))
    assert [file.name for file in found] == names
    for file in found:  # each listed URI leads back to its own object
        again = list_files(corpus(file.path))
        assert [(each.path, each.format) for each in again] == [(file.path, file.format)]


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_the_address_may_come_from_the_environment(
    client: Any, server: str, here: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    upload(client, here, "top")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv(name, server)
    assert [file.path for file in list_files(corpus("s3://rows/top/*.jsonl"))] == [
        "s3://rows/top/a.jsonl"
    ]


def test_the_fingerprint_is_of_content(client: Any, server: str, here: Path) -> None:
    client.create_bucket(Bucket="copy")
    upload(client, here, "top")
    uri = f"s3://rows/top?endpoint_override={server}"
    before = corpus_fingerprint(corpus(uri))
    assert corpus_fingerprint(corpus(uri)) == before
    upload(client, here, "top")
    upload(client, here, "elsewhere", bucket="copy")
    assert corpus_fingerprint(corpus(uri)) == before
    assert corpus_fingerprint(corpus(f"s3://copy/elsewhere?endpoint_override={server}")) == before
    text = (here / "a.jsonl").read_bytes()
    changed = text.replace(b"0 + 1", b"0 + 2")  # as many bytes, and within the same second
    client.put_object(Bucket="rows", Key="top/a.jsonl", Body=changed)
    assert corpus_fingerprint(corpus(uri)) != before
    client.put_object(Bucket="rows", Key="top/a.jsonl", Body=text)
    assert corpus_fingerprint(corpus(uri)) == before
    client.put_object(Bucket="rows", Key="top/f.jsonl", Body=text)
    assert corpus_fingerprint(corpus(uri)) != before


def test_what_is_not_there(client: Any, server: str, here: Path) -> None:
    upload(client, here, "top")
    for path in ("absent/top", "absent/*.jsonl", "rows/absent", "rows/top/absent.jsonl"):
        message = refusal(f"s3://{path}?endpoint_override={server}&region=us-east-1")
        assert "no such bucket, file or folder; check the names" in message
    message = refusal(f"s3://rows/top/*.md?endpoint_override={server}&region=us-east-1")
    assert "holds no corpus file" in message


def test_credentials_that_the_store_does_not_know(client: Any, server: str, here: Path) -> None:
    upload(client, here, "top")
    request(server, "reset-auth", b"0")
    try:
        for path in ("rows/top", "rows/top/*.jsonl", "rows/top/a.jsonl"):
            message = refusal(f"s3://{path}?endpoint_override={server}&region=us-east-1")
            assert "ACCESS_DENIED" in message
            assert (
                "check the bucket, endpoint_override= and region= in the URI, and AWS_" in message
            )
            assert SECRET not in message
    finally:
        request(server, "reset-auth", b"inf")


def test_a_saved_dataset_is_read_by_its_files(client: Any, server: str, tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list(rows(0, 3)).save_to_disk(tmp_path / "saved")
    upload(client, tmp_path / "saved", "saved")
    query = f"?endpoint_override={server}&region=us-east-1"
    message = refusal(f"s3://rows/saved{query}")
    assert (
        "a saved dataset on an object store; give its files as s3://rows/saved/*.arrow" in message
    )
    _, kept, _ = prepared(corpus(f"s3://rows/saved/*.arrow{query}"), tmp_path / "collect")
    assert len(kept) == 3


def test_an_object_that_went_since_it_was_planned_is_named(
    client: Any, server: str, here: Path, tmp_path: Path
) -> None:
    upload(client, here, "top")
    uri = f"s3://rows/top?endpoint_override={server}&region=us-east-1"
    job = PrepareJob(
        corpus=corpus(uri), model=embedded_path("student"), max_model_len=96, folder=tmp_path
    )
    parts = find_parts(job.corpus)
    client.delete_object(Bucket="rows", Key="top/b.jsonl.gz")
    for part in parts:
        prepare_part(part, job)
    with pytest.raises(InputError, match=r"1 files cannot be read") as caught:
        finish(parts, job)
    assert "s3://rows/top/b.jsonl.gz" in str(caught.value)
    assert SECRET not in str(caught.value)
