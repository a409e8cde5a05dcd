"""Fewer rows at once when memory runs out, more again when it lasts."""

from collections.abc import Callable, Sequence, Sized
from typing import Generic, TypeVar

from pear_ray.errors import EngineError, OutOfMemoryError

Row = TypeVar("Row", bound=Sized)  # its length is its tokens
T = TypeVar("T")
CALM_CALLS = 8  # that must go well before twice as many rows are tried again


class BackingOff(Generic[Row, T]):
    """Calls `act` on at most so many rows at once, halving on each out-of-memory error."""

    def __init__(self, act: Callable[[Sequence[Row]], list[T]], *, at_most: int) -> None:
        self._act, self._most = act, at_most
        self.rows_at_once = at_most
        self._calm = 0

    def __call__(self, rows: Sequence[Row]) -> list[T]:
        """`act` on all `rows`, in order.

        Raises:
            EngineError: Memory does not do for a single row.
        """
        done: list[T] = []
        while len(done) < len(rows):
            tried = rows[len(done) : len(done) + self.rows_at_once]
            try:
                done += self._act(tried)
            except OutOfMemoryError as error:
                if len(tried) == 1:
                    raise EngineError(
                        f"out of memory on one row of {len(tried[0])} tokens; lower "
                        "score.chunk_tokens, cluster.kv_cache_gib or cluster.gpu_memory_fraction, "
                        "or models.max_model_len"
                    ) from error
                self.rows_at_once, self._calm = len(tried) // 2, 0
            else:
                self._calm += 1
                if self._calm >= CALM_CALLS and self.rows_at_once < self._most:
                    self.rows_at_once = min(self._most, 2 * self.rows_at_once)
                    self._calm = 0
        return done
