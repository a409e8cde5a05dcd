"""The API key: who is let in, when one is needed, and which will not do."""

import pytest

from pear_ray.errors import ConfigError
from pear_ray.serving.key import KeyCheck, is_loopback, key_from_environment
from pear_ray.serving.settings import KEY_VARIABLE

KEY = "0123456789abcdef"


@pytest.mark.parametrize(
    ("header", "admitted"),
    [
        (f"Bearer {KEY}", True),
        (f"bearer {KEY}", True),
        (f"Basic {KEY}", False),
        (f"Bearer {KEY}0", False),
        (f"Bearer {KEY[:-1]}", False),
        ("Bearer ", False),
        (KEY, False),
        ("Bearer \xff\xfe", False),
        ("", False),
    ],
)
def test_only_the_whole_key_is_admitted(header: str, *, admitted: bool) -> None:
    assert KeyCheck(KEY).admits(header) is admitted


def test_without_a_key_everybody_is_admitted() -> None:
    assert not KeyCheck(None).asks
    assert KeyCheck(None).admits("")


def test_the_check_does_not_hold_the_key() -> None:
    assert KEY not in repr(vars(KeyCheck(KEY)))


def test_beyond_loopback_a_key_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert key_from_environment(needed=False, why="") is None
    with pytest.raises(ConfigError, match=r"--host 0.0.0.0.*PEAR_RAY_API_KEY is not set.*openssl"):
        key_from_environment(needed=True, why="--host 0.0.0.0 is not loopback")


@pytest.mark.parametrize("key", ["short", "0123456789 abcdef", "0123456789abcdeé"])
def test_a_key_that_will_not_do_is_not_shown(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, key)
    with pytest.raises(ConfigError, match=rf"{KEY_VARIABLE} has {len(key)} characters") as error:
        key_from_environment(needed=False, why="")
    assert key not in str(error.value)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("localhost.example.org", False),
    ],
)
def test_loopback(host: str, *, loopback: bool) -> None:
    assert is_loopback(host) is loopback
