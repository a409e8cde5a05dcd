"""A connection to a cluster's job server: one clear error at once where there is none."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import ray
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from pear_ray.errors import ClusterError

DEFAULT_ADDRESS = "http://127.0.0.1:8265"  # Ray's, of a dashboard
ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"
ADDRESS_VARIABLES = (ADDRESS_VARIABLE, "RAY_ADDRESS")
CONNECT_S, ANSWER_S = 5.0, 60.0
FORBIDDEN = 403


class Client(JobSubmissionClient):
    """Ray's own client, which gives up on an address that does not answer.

    Without a limit a request to a machine that is gone hangs for as long as its system retries.
    """

    @property
    def ray_version(self) -> str:
        """Of the cluster, as it said when we connected."""
        return self._server_ray_version or ""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        return super()._do_request(method, endpoint, timeout=(CONNECT_S, ANSWER_S), **options)


def connect(address: str | None = None) -> Client:
    """A client of the cluster at `address`, which is the URL of its dashboard.

    Without one that of RAY_API_SERVER_ADDRESS or RAY_ADDRESS, or this machine's.

    Raises:
        ClusterError: Nothing answers there, it does not let us in, or it runs another Ray.
    """
    url = dashboard_url(address)
    with _address_as_given(url), named_errors(url):
        client = Client(url)
    theirs = client.ray_version
    if _minor(theirs) != _minor(ray.__version__):
        raise ClusterError(
            f"{url} runs Ray {theirs}, and this machine has Ray {ray.__version__}: what one packs "
            "the other may not read; install the cluster's version here, or start the cluster "
            "with this one"
        )
    return client


def dashboard_url(address: str | None) -> str:
    """Where the job server is: what was given, or what the environment says, or this machine.

    Raises:
        ClusterError: It is no URL of a dashboard.
    """
    if address is None:
        said = [os.environ[name] for name in ADDRESS_VARIABLES if os.environ.get(name)]
        address = next((each for each in said if "://" in each), DEFAULT_ADDRESS)
    if not address.startswith(("http://", "https://")):
        raise ClusterError(
            f"--address {address}: not the URL of a dashboard, which takes jobs; give it as "
            "http://HOST:8265"
        )
    return address.rstrip("/")


@contextlib.contextmanager
def named_errors(url: str) -> Iterator[None]:
    """Turn what a request to `url` raises into one clear error.

    Raises:
        ClusterError: It did.
    """
    try:
        yield
    except AuthenticationError as error:
        raise ClusterError(f"{url} does not let us in: {_why_refused(str(error))}") from error
    except (requests.exceptions.RequestException, ConnectionError) as error:
        raise ClusterError(
            f"no Ray dashboard answers at {url} ({type(error).__name__}); check the address, that "
            "the cluster runs, and the way there (for one behind a firewall a tunnel: "
            "`ssh -L 8265:127.0.0.1:8265 HEAD`, or `kubectl port-forward`)"
        ) from error
    except (RuntimeError, KeyError) as error:
        raise ClusterError(f"{url} does not answer as a Ray job server does: {error}") from error


def _why_refused(said: str) -> str:
    has_token = any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    if os.environ.get("RAY_AUTH_MODE") != "token":
        return "it wants a token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH"
    if "Authentication required" in said:
        return "no token was found here; set RAY_AUTH_TOKEN_PATH to the file with the cluster's"
    where = "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH" if has_token else "~/.ray/auth_token"
    return f"the token of {where} is not the cluster's"


@contextlib.contextmanager
def _address_as_given(url: str) -> Iterator[None]:
    """Have Ray take `url`: its client would prefer RAY_ADDRESS to what it is told."""
    before = os.environ.get(ADDRESS_VARIABLE)
    os.environ[ADDRESS_VARIABLE] = url
    try:
        yield
    finally:
        if before is None:
            del os.environ[ADDRESS_VARIABLE]
        else:
            os.environ[ADDRESS_VARIABLE] = before


def _minor(version: str) -> tuple[str, ...]:
    return tuple(version.split(".")[:2])
