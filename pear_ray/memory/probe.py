"""A matrix product and a sum over memory, timed: `python -m pear_ray.memory.probe` prints JSON.

In a process of its own, because BLAS reads its number of threads when it is loaded. NumPy's
float32 products reach 0.9 of torch's on the machine that the benchmarks ran on.
"""

import json
import sys
import time
from collections.abc import Callable

import numpy as np

SIZE = 1024  # of the square matrices: 4 MiB each
READ_BYTES = 128 * 2**20  # more than caches hold
REPEATS = 15


def main() -> None:
    """Print both figures."""
    left = np.random.default_rng(0).random((SIZE, SIZE), dtype=np.float32)
    out = np.empty_like(left)
    product_s = shortest(lambda: np.matmul(left, left, out=out))
    memory = np.ones(READ_BYTES // 4, dtype=np.float32)
    read_s = shortest(memory.max)
    found = {"flops_per_s": 2 * SIZE**3 / product_s, "bytes_per_s": READ_BYTES / read_s}
    sys.stdout.write(json.dumps(found) + "\n")


def shortest(act: Callable[[], object]) -> float:
    """Wall seconds of the fastest of a few calls."""
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        act()
        times.append(time.perf_counter() - began)
    return min(times)


if __name__ == "__main__":
    main()
