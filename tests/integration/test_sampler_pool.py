"""A pool of engines that loses one: the completions are those of a pool that did not."""

import os
import signal
from pathlib import Path

import pytest
import ray
from training_runs import run_config

from pear_ray.config.run import validate_run
from pear_ray.distributed.capacity import engine_spec
from pear_ray.distributed.samplers import SamplerPool
from pear_ray.embedded.paths import embedded_path
from pear_ray.engines.vllm.spec import Sampling
from pear_ray.engines.weights import MAX_GAP
from pear_ray.errors import EngineError
from pear_ray.records import Completion

STUDENT, TEACHER = embedded_path("student"), embedded_path("teacher")
PROMPTS = [[5 + number % 40, 7, 11, 13] for number in range(96)]


def test_a_lost_engine_is_replaced_and_its_call_made_again(local_ray: None, tmp_path: Path) -> None:
    tree = run_config(tmp_path).model_dump(mode="json")
    tree["cluster"] |= {"num_samplers": 2, "max_failures": 1}
    config = validate_run(tree, origin="test")
    with SamplerPool(config, engine_spec(config, TEACHER), stage="test") as pool:
        pool.load(STUDENT, max_gap=MAX_GAP["float32"])
        whole = sample(pool, kill=False)
        # Another engine is there by the end, with the weights that were loaded.
        assert sample(pool, kill=True) == whole
        with pytest.raises(EngineError, match="its process died"):
            sample(pool, kill=True)


def sample(pool: SamplerPool, *, kill: bool) -> list[list[Completion]]:
    """Completions of all prompts; an engine is killed after the first call, if at all."""
    sampling = [
        Sampling(num_samples=2, temperature=1.0, max_tokens=64, seed=n) for n in range(len(PROMPTS))
    ]
    done: list[int] = []
    if kill:
        first = ray.get(pool._all[0].actors[0].__ray_call__.remote(lambda _: os.getpid()))

    def progress(prompts: int, tokens: int) -> None:
        if kill and not done:
            os.kill(first, signal.SIGKILL)
        done.append(prompts)

    found = pool.generate(PROMPTS, sampling, progress=progress, prompts_per_call=8)
    assert done == [8 * (n + 1) for n in range(12)]
    return found
