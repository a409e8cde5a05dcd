"""Which Ray a driver goes to, and what is said of an address that is none."""

import socket
import time

import pytest

from pear_ray.connection import connect, wanted_cluster
from pear_ray.errors import ConfigError, PearRayError

HEAD, OTHER = "10.0.0.1:6379", "10.0.0.2:6379"


@pytest.mark.parametrize(
    ("address", "environ", "wanted"),
    [
        (None, {}, "local"),
        (HEAD, {}, HEAD),
        (None, {"RAY_ADDRESS": OTHER}, None),
        (HEAD, {"RAY_ADDRESS": OTHER}, HEAD),
        # A job, to which Ray gives both: it stays where it was sent.
        (HEAD, {"RAY_ADDRESS": OTHER, "RAY_JOB_ID": "01000000"}, None),
        (None, {"RAY_ADDRESS": OTHER, "RAY_JOB_ID": "01000000"}, None),
    ],
)
def test_which_ray_it_is(address: str | None, environ: dict[str, str], wanted: str | None) -> None:
    assert wanted_cluster(address, environ) == wanted


def test_an_address_where_nothing_is_is_one_error_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(PearRayError, match=rf"cluster.address={address}: nothing answers"):
            connect(address, setting="cluster.address", with_url="submit it")
        assert time.monotonic() - began < 10
    with pytest.raises(ConfigError, match=r"give HOST:PORT .* dashboard's URL, submit it"):
        connect("http://127.0.0.1:8265", setting="cluster.address", with_url="submit it")
