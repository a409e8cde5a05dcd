"""What went wrong in another process, unwrapped from what Ray puts around it."""

import contextlib
import errno
import logging
from collections.abc import Iterable, Iterator

import ray
import ray.data

from pear_ray.errors import DISK_FULL, EngineError, PearRayError

RAY_DATA_NOTE = "\nFailed to apply UDF transform"  # which it adds to the message of our errors


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
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"{DISK_FULL}; what is written stays, so free some and run the same command again"
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
                raise type(link)(str(link).partition(RAY_DATA_NOTE)[0]) from error
        raise EngineError(f"{doing} failed: {one_line(chain[0])}") from error
    except ray.exceptions.RayActorError as error:
        lines = str(error).strip().splitlines() or [""]
        # An actor that fails in __init__ reaches us as text only; our own message is in it.
        ours = [line for line in lines if line.startswith("pear_ray.errors.")]
        cause = ours[-1].partition(": ")[2] if ours else f"its process died: {lines[0]}"
        raise EngineError(f"{doing} failed: {cause}") from error


def quiet_ray_data() -> None:
    """Have Ray Data leave progress to our own view, and hand on what our functions raise."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # Otherwise an error of ours comes wrapped in one that says nothing of it, and loses its cause
    # on the way here.
    context.raise_original_map_exception = True
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # the driver says what failed, once
