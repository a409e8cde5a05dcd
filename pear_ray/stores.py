"""File systems by path or URI: object stores that answer soon or not at all, and no secrets."""

import os
import re
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import pyarrow.fs as pafs

from pear_ray.errors import InputError

# By default a store that accepts a connection and says nothing holds a run up for 100 s (S3), and
# one that refuses it for 15 minutes (GCS).
CONNECT_TIMEOUT_S = 5.0
REQUEST_TIMEOUT_S = 10.0  # without a byte; a store under load answers within a few seconds
MAX_ATTEMPTS = 3  # what S3 clients call the standard number
GCS_RETRY_LIMIT_S = 20

S3 = "s3"
GCS = ("gs", "gcs")
S3_OPTIONS = ("endpoint_override", "region", "scheme", "tls_ca_file_path")
_SECRET = re.compile(r"(?i)access_?key|account_?key|secret|token|password|signature|^sig$")
# What a store knows of an object's content, best first: Google's `etag` changes with metadata.
_CONTENT_HASHES = ("md5Hash", "crc32c", "ETag")


def refuse_secrets(path: str, *, key: str) -> None:
    """See that the URI at `key` of a run file carries no credentials: it is written into configs.

    Raises:
        InputError: It has a user and password, an S3 access key, or a secret in its query.
    """
    scheme, mark, rest = path.partition("://")
    if not mark:
        return
    address, _, query = rest.partition("?")
    host, _, _ = address.partition("/")
    if scheme == S3:  # a secret key may hold a slash; the name of a bucket holds no colon
        has_user = "@" in host or (":" in host and "@" in address)
    else:
        has_user = ":" in host.rpartition("@")[0]
    found = ["what is before the @"] if has_user else []
    for name, value in _options(query).items():
        if _SECRET.search(name) or re.search(r"//[^/]*@", value):
            found.append(f"{name}=")
    if found:  # the message names no value, since messages are kept as well
        raise InputError(
            f"{key}={scheme}://...: carries credentials ({', '.join(found)}), and it is written "
            "into config.yaml and the tables; take them out, and set AWS_ACCESS_KEY_ID "
            "and AWS_SECRET_ACCESS_KEY (s3://) or GOOGLE_APPLICATION_CREDENTIALS (gs://) instead"
        )


def open_filesystem(
    path: str, *, key: str, max_attempts: int = MAX_ATTEMPTS
) -> tuple[pafs.FileSystem, str]:
    """The file system of `path`, given at `key`, and its name there; a store gives up soon.

    Raises:
        InputError: Its scheme or its query is none that is known, or its bucket's region cannot be
            found out.
    """
    if "://" not in path:
        return pafs.LocalFileSystem(), str(Path(path).expanduser())
    scheme = path.partition("://")[0]
    try:
        if scheme == S3:
            return _open_s3(path, max_attempts=max_attempts)
        return pafs.FileSystem.from_uri(_with_retry_limit(path) if scheme in GCS else path)
    except (ValueError, OSError) as error:
        raise InputError(f"{key}={path}: cannot be opened{because(path, error)}") from error


def because(path: str, error: Exception) -> str:
    """What went wrong at `path`, and for an object store what to look at, as an error's end."""
    said = f" ({' '.join(str(error).split())})"
    scheme = path.partition("://")[0]
    if isinstance(error, ValueError):  # of the URI itself; nobody was asked
        return said
    if scheme == S3:
        return (
            f"{said}; check the bucket, endpoint_override= and region= in the URI, and "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or ~/.aws (docs/corpora.md)"
        )
    if scheme in GCS:
        return (
            f"{said}; check the bucket, endpoint_override= in the URI, and "
            "GOOGLE_APPLICATION_CREDENTIALS, or begin with gs://anonymous@ (docs/corpora.md)"
        )
    return said


def content_mark(system: pafs.FileSystem, inside: str) -> str:
    """Size of an object and the hash that its store keeps, or the time where it keeps none.

    A time has whole seconds on S3, and uploading the same again changes it.

    Raises:
        OSError: The object cannot be opened.
    """
    with system.open_input_file(inside) as file:
        size, known = file.size(), file.metadata() or {}
    hashes = (known[name].decode() for name in _CONTENT_HASHES if known.get(name))
    return f"{size} {next(hashes, None) or system.get_file_info(inside).mtime_ns}"


def _open_s3(uri: str, *, max_attempts: int) -> tuple[pafs.S3FileSystem, str]:
    """An S3 store that gives up soon; only the constructor takes timeouts, a URI does not."""
    parts = urlsplit(uri)
    if ":" in parts.netloc:
        raise ValueError(
            f"{parts.netloc!r} is no bucket; write s3://BUCKET/KEY?endpoint_override="
            f"http://{parts.netloc}"
        )
    options = _options(parts.query)
    # Where a URI says nothing, pyarrow goes by these; its constructor does not.
    address = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if address:
        options = {"endpoint_override": address} | options
    if unknown := options.keys() - set(S3_OPTIONS):
        raise ValueError(
            f"unknown in an s3:// query: {', '.join(sorted(unknown))}; "
            f"known: {', '.join(S3_OPTIONS)}"
        )
    found, inside = pafs.FileSystem.from_uri(uri)  # checks values, finds the bucket's region
    system = pafs.S3FileSystem(
        **options | {"region": found.region},
        connect_timeout=CONNECT_TIMEOUT_S,
        request_timeout=REQUEST_TIMEOUT_S,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=max_attempts),
        allow_delayed_open=True,  # a small object is one request, not three
    )
    return system, inside


def _options(query: str) -> dict[str, str]:
    plus_is_a_plus = query.replace("+", "%2B")  # as pyarrow has it; in a form it is a space
    return dict(parse_qsl(plus_is_a_plus, keep_blank_values=True))


def _with_retry_limit(uri: str) -> str:
    base, mark, query = uri.partition("?")
    if "retry_limit_seconds" in _options(query):
        return uri
    return f"{base}?{query}{'&' if mark else ''}retry_limit_seconds={GCS_RETRY_LIMIT_S}"
