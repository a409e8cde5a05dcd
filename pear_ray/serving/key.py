"""The API key: read from the environment, kept as a digest, compared in constant time."""

import hashlib
import hmac
import ipaddress
import os

from pear_ray.errors import ConfigError
from pear_ray.serving.settings import KEY_VARIABLE

MIN_CHARACTERS = 16  # shorter ones can be guessed by trying


class KeyCheck:
    """Whether a caller's Authorization header carries the key; without one every caller passes."""

    def __init__(self, key: str | None) -> None:
        # The digest alone is kept, so that no dump of this process's objects shows the key.
        self._digest = None if key is None else _digest(key)

    @property
    def asks(self) -> bool:
        """Whether a key is asked for."""
        return self._digest is not None

    def admits(self, authorization: str) -> bool:
        """Whether `Bearer KEY` carries the key; what it takes does not tell how much was right."""
        if self._digest is None:
            return True
        scheme, _, presented = authorization.partition(" ")
        # Digests have one length, so that not even the key's shows.
        same = hmac.compare_digest(_digest(presented.strip()), self._digest)
        return same and scheme.lower() == "bearer"


def key_from_environment(*, needed: bool, why: str) -> str | None:
    """The key of PEAR_RAY_API_KEY; None where there is none and none is needed.

    Raises:
        ConfigError: It is needed and not set, or it is too short or cannot be sent in a header.
    """
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not key:
        if needed:
            raise ConfigError(
                f"{why}, and {KEY_VARIABLE} is not set, so anybody there could use the models; "
                f"`export {KEY_VARIABLE}=$(openssl rand -hex 32)`, or serve on 127.0.0.1"
            )
        return None
    if len(key) < MIN_CHARACTERS or not (key.isascii() and key.isprintable()) or " " in key:
        raise ConfigError(
            f"{KEY_VARIABLE} has {len(key)} characters; it must be {MIN_CHARACTERS} or more of "
            f"printable ASCII without spaces: `export {KEY_VARIABLE}=$(openssl rand -hex 32)`"
        )
    return key


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
