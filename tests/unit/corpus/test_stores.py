"""Stores that do not answer, and URIs that cannot mean anything; no server is needed for these."""

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from by_hand import corpus

from pear_ray import stores
from pear_ray.corpus.files import corpus_fingerprint, list_files
from pear_ray.errors import InputError
from pear_ray.stores import refuse_secrets


def refusal(path: str) -> str:
    """The one error that the path ends with, whoever asks first."""
    said = []
    for ask in (list_files, corpus_fingerprint):
        with pytest.raises(InputError, match=r"^corpus\.path=") as caught:
            ask(corpus(path))
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert "\n" not in said[0]
    return said[0]


@pytest.fixture
def no_credentials_of_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What this machine has for a real store is not asked for, nor sent to anyone."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "of-a-test")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "absent"))
    for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture
def refusing_port() -> Iterator[int]:
    """A port that is taken, where nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("s3://AKIA:hidden@rows/a.jsonl", "what is before the @"),
        ("s3://AKIA:hid/den@rows/a.jsonl", "what is before the @"),  # keys may hold a slash
        ("s3://AKIA-hidden@rows/a.jsonl", "what is before the @"),
        ("hdfs://me:hidden@host/a.jsonl", "what is before the @"),
        ("s3://rows/a.jsonl?access_key=hidden&secret_key=hidden", "access_key=, secret_key="),
        ("s3://rows/a.jsonl?region=x&session_token=hidden", "session_token="),
        ("s3://rows/*.jsonl?endpoint_override=http://me:hidden@host:9000", "endpoint_override="),
        ("s3://rows/*.jsonl?endpoint_override=http%3A%2F%2Fme:hidden@host", "endpoint_override="),
        ("abfs://rows@account/a.jsonl?sas_token=hidden", "sas_token="),
        ("https://rows/a.jsonl?X-Amz-Signature=hidden", "X-Amz-Signature="),
    ],
)
def test_credentials_in_a_uri_are_refused_and_not_repeated(path: str, what: str) -> None:
    message = refusal(path)
    assert f"carries credentials ({what})" in message
    assert "AWS_SECRET_ACCESS_KEY" in message
    assert "hidden" not in message
    assert "den@" not in message


@pytest.mark.parametrize(
    "path",
    [
        "/a:b@c/rows.jsonl",
        "s3://rows/a:b@c.jsonl?endpoint_override=http://host:9000&region=x&scheme=http",
        "s3://rows/a.jsonl?tls_ca_file_path=/keys/ca.pem",
        "gs://anonymous@rows/a.jsonl",
        "hdfs://me@host:8020/a.jsonl",
        "abfs://rows@account.dfs.core.windows.net/a.jsonl",
    ],
)
def test_what_looks_like_credentials_and_is_none(path: str) -> None:
    refuse_secrets(path, key="corpus.path")


def test_a_pattern_for_a_bucket_would_list_all_that_an_account_has() -> None:
    assert "a pattern cannot stand for a bucket" in refusal("s3://r*/a.jsonl")
    assert "a pattern cannot stand for a bucket" in refusal("gs://*/a.jsonl?scheme=http")


def test_a_uri_that_cannot_mean_anything() -> None:
    message = refusal("s3://localhost:9000/rows/a.jsonl")
    assert "write s3://BUCKET/KEY?endpoint_override=http://localhost:9000" in message
    message = refusal("s3://rows/a.jsonl?regoin=x")
    assert "unknown in an s3:// query: regoin; known: endpoint_override, region, " in message
    assert "AWS_ACCESS_KEY_ID" not in message  # nobody was asked for anything yet
    assert "Cannot parse URI" in refusal("s3://rows/a b.jsonl?region=x")
    assert "Unexpected query parameter" in refusal("gs://rows/a.jsonl?regoin=x")


@pytest.mark.usefixtures("no_credentials_of_ours")
def test_a_store_that_refuses(refusing_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "MAX_ATTEMPTS", 1)
    uri = f"s3://rows/a.jsonl?endpoint_override=http://127.0.0.1:{refusing_port}&region=x"
    message = refusal(uri.replace("a.jsonl", "*.jsonl"))
    assert "cannot be looked at (When getting information for" in message
    assert "Could not connect to server" in message
    assert "AWS_ACCESS_KEY_ID" in message


@pytest.mark.usefixtures("no_credentials_of_ours")
def test_a_store_that_says_nothing(silent_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "MAX_ATTEMPTS", 1)
    monkeypatch.setattr(stores, "REQUEST_TIMEOUT_S", 1.0)  # by default it takes 100 s
    begun = time.monotonic()
    with pytest.raises(InputError, match=r"cannot be looked at .*Timeout was reached"):
        list_files(corpus(f"s3://rows/a?endpoint_override=http://127.0.0.1:{silent_port}&region=x"))
    assert time.monotonic() - begun < 10


def test_the_limits_hold_together_for_less_than_a_minute() -> None:
    patience = stores.CONNECT_TIMEOUT_S + stores.REQUEST_TIMEOUT_S
    assert patience * stores.MAX_ATTEMPTS < 60


@pytest.mark.usefixtures("no_credentials_of_ours")
def test_a_google_store_that_refuses(refusing_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "GCS_RETRY_LIMIT_S", 1)  # by default 15 minutes
    begun = time.monotonic()
    with pytest.raises(InputError, match=r"cannot be looked at .*Could not connect to server"):
        list_files(
            corpus(f"gs://anonymous@rows/a?endpoint_override=127.0.0.1:{refusing_port}&scheme=http")
        )
    assert time.monotonic() - begun < 10


def test_a_retry_limit_that_was_said_is_kept() -> None:
    assert stores._with_retry_limit("gs://rows/a") == "gs://rows/a?retry_limit_seconds=20"
    assert stores._with_retry_limit("gs://rows/a?scheme=http").endswith(
        "?scheme=http&retry_limit_seconds=20"
    )
    said = "gs://rows/a?retry_limit_seconds=300"
    assert stores._with_retry_limit(said) == said
