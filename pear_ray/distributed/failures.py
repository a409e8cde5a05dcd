"""What went wrong in another process, unwrapped from what Ray puts around it."""

import contextlib
from collections.abc import Iterable, Iterator

import ray

from pear_ray.errors import EngineError, PearRayError


def causes(errors: Iterable[BaseException]) -> Iterator[BaseException]:
    """Each error and what caused it, without Ray's own wrappers where the inside is known."""
    for error in errors:
        link: BaseException | None = error
        while link is not None:
            inside = getattr(link, "cause", None)  # of a RayTaskError
            if isinstance(inside, BaseException) and inside is not link:
                link = inside
                continue
            yield getattr(link, "_base_exc", link)  # Ray Train keeps a worker's error there
            link = link.__cause__ or link.__context__


def one_line(error: BaseException) -> str:
    """Type and last line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__


@contextlib.contextmanager
def engine_errors(doing: str) -> Iterator[None]:
    """Turn what Ray says of a failed actor or task into one of our errors, in one line.

    Raises:
        PearRayError: The actor raised it.
        EngineError: The actor died or raised anything else.
    """
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        chain = list(causes([error]))
        for link in chain:
            if isinstance(link, PearRayError):
                raise link from error
        # Ray Data wraps what a function of ours raised; the wrapper's text says nothing of it.
        wrapped = isinstance(chain[0], ray.exceptions.UserCodeException) and len(chain) > 1
        raise EngineError(f"{doing} failed: {one_line(chain[1 if wrapped else 0])}") from error
    except ray.exceptions.RayActorError as error:
        lines = str(error).strip().splitlines() or [""]
        # An actor that fails in __init__ reaches us as text only; our own message is in it.
        ours = [line for line in lines if line.startswith("pear_ray.errors.")]
        cause = ours[-1].partition(": ")[2] if ours else f"its process died: {lines[0]}"
        raise EngineError(f"{doing} failed: {cause}") from error
