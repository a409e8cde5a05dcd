"""The evaluator beside plain vLLM: the same requests, tokens per CPU-second of one process.

Ours also takes log-probs, decodes, verifies every completion, and writes the table's rows and the
summary with its intervals; plain vLLM only samples.
"""

import functools
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from processes import in_process
from record import Figure, write_parts

from pear_ray.engines.environment import engine_environment

GOAL = 0.9
ENVIRON = engine_environment(device="cpu", num_threads=1, kv_cache_gib=1)
RUNS = Path(__file__).parents[1] / "jobs" / "runs"
PASSES = 3


def main() -> None:
    """Measure the parts that are asked for, and write the figures."""
    write_parts("evaluate", {"small": small, "smollm2": smollm2})


def small() -> list[Figure]:
    """The demo's student (0.3M), where Python costs as much as the model."""
    return figures("small", "demo")


def smollm2() -> list[Figure]:
    """SmolLM2-135M in bfloat16."""
    return figures("smollm2", "smollm2")


def figures(part: str, run: str) -> list[Figure]:
    """Both sides on the evaluation of `run`, a file in jobs/runs."""
    found = in_process("evaluate.paces", run, environ=ENVIRON, timeout_s=1200)
    ratio, like = (found["ours"] / found[name] for name in ("plain", "with_logprobs"))
    return [
        Figure(
            name=f"{part}: tokens per CPU-second, sampled, verified, summarised",
            value=found["ours"],
            unit="tokens/CPU-s",
            reference="plain vLLM on the same requests, the same process",
            ratio=ratio,
            goal=f"at least {GOAL}",
            holds=ratio >= GOAL,
        ),
        Figure(name=f"{part}: plain vLLM", value=found["plain"], unit="tokens/CPU-s"),
        Figure(
            name=f"{part}: tokens per CPU-second, log-probs on both sides",
            value=found["ours"],
            unit="tokens/CPU-s",
            reference="plain vLLM that gives log-probs",
            ratio=like,
        ),
    ]


def paces(run: str) -> dict[str, float]:
    """Best of a few passes of each, one after the other in turn."""
    from pear_ray.config.run import load_run
    from pear_ray.distributed.capacity import engine_spec
    from pear_ray.distributed.evaluation import evaluation_requests
    from pear_ray.engines.chat import ChatTokenizer
    from pear_ray.engines.model_files import resolve_model
    from pear_ray.engines.vllm.engine import VllmEngine
    from pear_ray.tasks.reward_pool import RewardPool

    config = load_run(RUNS / f"{run}.yaml")
    model = resolve_model(config.models.policy)
    engine = VllmEngine(engine_spec(config, model), takes_weights=True)
    (asked,) = evaluation_requests(config, ChatTokenizer(model))
    works = {
        "ours": evaluated,
        "plain": sampled,
        "with_logprobs": functools.partial(sampled, logprobs=0),
    }
    best = dict.fromkeys(works, 0.0)
    with RewardPool(asked.suite.rewards) as pool:
        pool.wait_until_ready()
        for _ in range(PASSES):
            for name, work in works.items():
                best[name] = max(best[name], pace(work, config, engine, asked, pool))
    return best


def pace(work: Any, config: Any, engine: Any, asked: Any, pool: Any) -> float:
    """Tokens per CPU-second of one pass, verifiers' processes included."""
    began = cpu_s(pool)
    tokens = work(config, engine, asked, pool)
    return tokens / (cpu_s(pool) - began)


def evaluated(config: Any, engine: Any, asked: Any, pool: Any) -> int:
    """What the evaluate stage does with a checkpoint that is loaded; its tokens."""
    from pear_ray.tasks.judging import judge, sample_rows, summarise

    groups = [
        group
        for call in asked.calls()
        for group in engine.generate(asked.prompts[call], asked.sampling[call])
    ]
    judged = judge(pool, asked.problems, groups)
    rows = list(sample_rows(asked.suite.name, "sft", asked.problems, groups, judged))
    summarise(asked.suite, judged, seed=config.seed)
    return sum(row["num_tokens"] for row in rows)


def sampled(
    config: Any,  # noqa: ARG001 - as `evaluated`
    engine: Any,
    asked: Any,
    pool: Any,  # noqa: ARG001
    *,
    logprobs: int | None = None,
) -> int:
    """The same requests to vLLM alone; the tokens it gave."""
    from vllm import SamplingParams

    params = [
        SamplingParams(
            n=each.num_samples,
            temperature=each.temperature,
            max_tokens=each.max_tokens,
            seed=each.seed,
            detokenize=False,
            logprobs=logprobs,
            flat_logprobs=logprobs is not None,
        )
        for each in asked.sampling
    ]
    tokens = 0
    for call in asked.calls():
        prompts = [{"prompt_token_ids": list(ids)} for ids in asked.prompts[call]]
        outputs = engine.llm.generate(prompts, params[call], use_tqdm=False)
        tokens += sum(len(one.token_ids) for output in outputs for one in output.outputs)
    return tokens


def cpu_s(pool: Any) -> float:
    """User and system seconds of this process, and of the processes that verify."""
    import os

    import psutil

    of_verifiers = sum(
        sum(child.cpu_times()[:2])
        for child in psutil.Process(os.getpid()).children(recursive=True)
        if pool
    )
    return sum(psutil.Process(os.getpid()).cpu_times()[:2]) + of_verifiers


if __name__ == "__main__":
    main()
