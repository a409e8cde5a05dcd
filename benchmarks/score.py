"""Scoring: throughput beside plain vLLM, a million rows, and memory at a large vocabulary.

`python benchmarks/score.py` does all three (about 20 minutes on two cores); with the name of one
(`throughput`, `million`, `memory`) only that one, leaving the others' figures as they are.
"""

import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).parent))
from processes import in_process
from record import Figure, write_parts

GOAL_RATIO, GOAL_GROWTH_MIB, GOAL_FLAT = 0.95, 500, 0.9
ROWS, ROW_TOKENS = 20_000, 120
MILLION, SHORT = 1_000_000, 8
LARGE_VOCABULARY, LONG_ROW = 151_936, 8_192
BLOCK = 256
LOOK_S = 4.0  # a look at all processes takes 10 ms of CPU


def main() -> None:
    """Measure what is asked for, and write the figures."""
    write_parts("score", {"throughput": throughput, "million": million, "memory": memory})


def throughput() -> list[Figure]:
    """Tokens per CPU-second of the whole process tree, once every engine runs: ours and plain."""
    before = in_process("score.scored_by_plain_vllm", ROWS, ROW_TOKENS)["tokens_per_cpu_s"]
    with tempfile.TemporaryDirectory() as folder:
        ours = in_process("score.scored_by_us", folder, ROWS, ROW_TOKENS)
    after = in_process("score.scored_by_plain_vllm", ROWS, ROW_TOKENS)["tokens_per_cpu_s"]
    plain = (before + after) / 2  # on both sides: a shared machine's pace drifts
    ratio = ours["tokens_per_cpu_s"] / plain
    return [
        Figure(
            name=f"throughput: {ROWS:,} rows of {ROW_TOKENS} tokens, one engine, process tree",
            value=ours["tokens_per_cpu_s"],
            unit="tokens/CPU-s",
            reference="plain vllm.LLM, prompt_logprobs, flat, one process: "
            f"{before:,.0f} before and {after:,.0f} tokens/CPU-s after",
            ratio=ratio,
            goal=f"at least {GOAL_RATIO:g} of plain",
            holds=ratio >= GOAL_RATIO,
        )
    ]


def million() -> list[Figure]:
    """What a million rows do to the driver's memory, and to the pace from first to last decile."""
    with tempfile.TemporaryDirectory() as folder:
        found = in_process("score.scored_by_us", folder, MILLION, SHORT)
    flat = found["last_decile_rows_per_s"] / found["first_decile_rows_per_s"]
    return [
        Figure(
            name=f"million: driver's memory growth over {MILLION:,} rows of {SHORT} tokens",
            value=found["driver_growth_mib"],
            unit="MiB",
            goal=f"at most {GOAL_GROWTH_MIB} MiB",
            holds=found["driver_growth_mib"] <= GOAL_GROWTH_MIB,
        ),
        Figure(
            name="million: rows per second in the last decile",
            value=found["last_decile_rows_per_s"],
            unit="rows/s",
            reference="the second decile (the first holds the engine's start): "
            f"{found['first_decile_rows_per_s']:,.0f} rows/s",
            ratio=flat,
            goal=f"at least {GOAL_FLAT:g} of the first",
            holds=flat >= GOAL_FLAT,
        ),
    ]


def memory() -> list[Figure]:
    """Peak memory of scoring one long row at a large vocabulary, by chunk."""
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        make_large_vocabulary_model(Path(folder))
        idle = in_process("score.peak_of_long_row", folder, 2048, 16)["peak_gib"]
        for chunk in (512, 2048):
            peak = in_process("score.peak_of_long_row", folder, chunk, LONG_ROW)["peak_gib"]
            bound = 9 * chunk * LARGE_VOCABULARY / 2**30
            figures.append(
                Figure(
                    name=f"memory: {LONG_ROW:,} tokens x {LARGE_VOCABULARY:,} vocabulary, "
                    f"score.chunk_tokens={chunk}, above a row of 16 tokens",
                    value=peak - idle,
                    unit="GiB",
                    reference="whole logits in float32: "
                    f"{4 * LONG_ROW * LARGE_VOCABULARY / 2**30:.2f} GiB",
                    ratio=(peak - idle) / (4 * LONG_ROW * LARGE_VOCABULARY / 2**30),
                    goal=f"at most {bound:.2f} GiB, 9 bytes x chunk x vocabulary",
                    holds=peak - idle <= bound,
                )
            )
    return figures


def corpus_rows(count: int, length: int) -> Iterator[dict[str, Any]]:
    """Rows of random ids of the embedded tokenizer, half of each trained."""
    generator = np.random.default_rng(0)
    mask = [False] * (length // 2) + [True] * (length - length // 2)
    for number in range(count):
        yield {
            "example_id": f"row-{number:08d}",
            "source": "bench",
            "is_negative": False,
            "token_ids": generator.integers(5, 260, size=length).tolist(),
            "loss_mask": mask,
        }


def scored_by_us(folder: str, count: int, length: int) -> dict[str, float]:
    """Score a corpus through Ray Data with one engine actor."""
    from pear_ray.artifacts.tables import CORPUS, TableWriter
    from pear_ray.distributed.scoring import ScoringJob, score_corpus
    from pear_ray.distributed.session import ray_session
    from pear_ray.embedded.paths import embedded_path

    config = run_config(folder, length)
    rows, number = corpus_rows(count, length), 0
    for part in range(-(-count // 4096)):
        with TableWriter(Path(folder) / "corpus" / f"part-{part:06d}.parquet", CORPUS) as writer:
            for _, row in zip(range(4096), rows, strict=False):
                writer.write(row)
                number += 1
    job = ScoringJob(
        config=config,
        corpus=Path(folder) / "corpus",
        folder=Path(folder) / "stage",
        models={"*": embedded_path("teacher")},
        keep_given=False,
        align="refuse",
    )
    driver, samples, seen = psutil.Process(), [], [0]
    with (
        ray_session(config.cluster),
        Watching(
            lambda: samples.append(
                (time.monotonic(), tree_cpu_s(driver), driver.memory_info().rss, seen[-1])
            ),
            every_s=LOOK_S,
        ),
    ):
        score_corpus(job, progress=seen.append)
    running = [each for each in samples if each[3] > 0]
    return {
        "tokens_per_cpu_s": length * rate(running, 1),
        "driver_growth_mib": (max(each[2] for each in samples) - samples[0][2]) / 2**20,
        "first_decile_rows_per_s": decile_pace(running, 1, count),
        "last_decile_rows_per_s": decile_pace(running, 9, count),
    }


def run_config(folder: str, length: int) -> Any:
    """A run that scores with one engine."""
    from pear_ray.config.run import validate_run

    games = {"games": [{"name": "chain_sum"}], "size": 8}
    return validate_run(
        {
            "name": "bench",
            "output_dir": folder,
            "models": {
                "policy": "embedded:student",
                "behavior": "embedded:teacher",
                "dtype": "float32",
                "max_model_len": length,
            },
            "corpus": {"kind": "dataset", "path": "unused"},
            "score": {"rows_per_block": BLOCK},
            "sft": {"optimizer": {"learning_rate": 1e-3}},
            "rl": {"problems": games, "optimizer": {"learning_rate": 1e-3}, "num_steps": 1},
            "evaluate": {"problems": games},
            "cluster": {"num_samplers": 1},
        },
        origin="benchmark",
    )


def scored_by_plain_vllm(count: int, length: int) -> dict[str, float]:
    """The same rows with nothing but `vllm.LLM`, as its fastest prompt log-probs are had."""
    from pear_ray.embedded.paths import embedded_path
    from pear_ray.engines.environment import engine_environment

    os.environ.update(engine_environment(device="cpu", num_threads=1, kv_cache_gib=1))
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(embedded_path("teacher")),
        dtype="float32",
        max_model_len=length + 1,
        enable_prefix_caching=False,
        enforce_eager=True,
        disable_log_stats=True,
    )
    params = SamplingParams(
        max_tokens=1, temperature=0.0, prompt_logprobs=0, flat_logprobs=True, detokenize=False
    )
    rows = [{"prompt_token_ids": row["token_ids"]} for row in corpus_rows(count, length)]
    llm.generate(rows[:BLOCK], params, use_tqdm=False)
    began = tree_cpu_s(psutil.Process())
    for begin in range(BLOCK, count, BLOCK):
        llm.generate(rows[begin : begin + BLOCK], params, use_tqdm=False)
    spent = tree_cpu_s(psutil.Process()) - began
    return {"tokens_per_cpu_s": length * (count - BLOCK) / spent}


def make_large_vocabulary_model(folder: Path) -> None:
    """A tiny random Qwen3 with the vocabulary and context of a large one."""
    import torch
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    from pear_ray.embedded.paths import embedded_path

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=LARGE_VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=LONG_ROW,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(embedded_path("student")).save_pretrained(folder)


def peak_of_long_row(folder: str, chunk: int, length: int) -> dict[str, float]:
    """Peak memory of an engine that scores one row."""
    from pear_ray.engines.environment import engine_environment

    os.environ.update(engine_environment(device="cpu", num_threads=1, kv_cache_gib=1))
    from pear_ray.engines.vllm.engine import VllmEngine
    from pear_ray.engines.vllm.spec import EngineSpec

    engine = VllmEngine(
        EngineSpec(model=folder, dtype="float32", max_model_len=LONG_ROW, chunk_tokens=chunk)
    )
    ids = np.random.default_rng(0).integers(0, LARGE_VOCABULARY, size=length).tolist()
    peaks = [0]
    with Watching(lambda: peaks.append(psutil.Process().memory_info().rss), every_s=0.02):
        engine.score([ids])
    return {"peak_gib": max(peaks) / 2**30}


class Watching:
    """Calls `look` again and again from a thread, as long as the `with` block."""

    def __init__(self, look: Callable[[], None], *, every_s: float = 1.0) -> None:
        self._look, self._every_s, self._stop = look, every_s, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._stop.wait(self._every_s):
            self._look()

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def tree_cpu_s(root: psutil.Process) -> float:
    """CPU seconds of a process and all that live below it."""
    total = 0.0
    for process in (root, *root.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def rate(samples: list[tuple[float, float, int, int]], clock: int) -> float:
    """Rows per second of `clock` (0: wall, 1: CPU) between the first and the last sample."""
    first, last = samples[0], samples[-1]
    return (last[3] - first[3]) / (last[clock] - first[clock])


def decile_pace(samples: list[tuple[float, float, int, int]], decile: int, count: int) -> float:
    """Rows per second over one tenth of `count` rows, counted from 0.

    The first tenth is left to the engine's start; decile 1 is the first one at full pace.
    """
    rows, times = [each[3] for each in samples], [each[0] for each in samples]
    begin, end = np.interp([decile * count / 10, (decile + 1) * count / 10], rows, times)
    return count / 10 / (end - begin)


if __name__ == "__main__":
    main()
