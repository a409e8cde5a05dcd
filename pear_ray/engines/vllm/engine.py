"""One in-process vLLM engine: samples completions, scores given ids, takes new weights."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
from vllm import LLM, SamplingParams
from vllm.config import ModelConfig, WeightTransferConfig
from vllm.config.lora import MaxLoRARanks
from vllm.distributed.device_communicators import cpu_communicator
from vllm.lora.request import LoRARequest
from vllm.outputs import CompletionOutput

from pear_ray.engines.policy import Policy
from pear_ray.engines.top_logprobs import MaskedIds, TopLogprobs, select_top, within_tokens
from pear_ray.engines.vllm import cpu_kernels, weights
from pear_ray.engines.vllm.flat_logprobs import chosen_logprobs, prompt_candidates
from pear_ray.engines.vllm.lean_scheduler import LeanScheduler
from pear_ray.engines.vllm.light_sampler import lighten
from pear_ray.engines.vllm.spec import (
    CANDIDATES_AT_ONCE,
    CPU_BATCHED_TOKENS,
    CPU_BLOCK_TOKENS,
    EngineSpec,
    Sampling,
)
from pear_ray.errors import EngineError, OutOfMemoryError
from pear_ray.records import Completion, FinishReason

if TYPE_CHECKING:
    from pear_ray.engines.vllm.adapters import AdapterSender

Memory = Literal["weights", "kv_cache"]  # as vLLM tags what sleeps
# There is no public name for it.
_vllms_name = cpu_communicator._CPUSHMDistributed.make_group_name  # noqa: SLF001


class VllmEngine:
    """An engine in this process; log-probs are of the distribution sampled from (logits / T)."""

    def __init__(self, spec: EngineSpec, *, takes_weights: bool = False) -> None:
        self.spec = spec
        transfer = WeightTransferConfig(backend=weights.BACKEND) if takes_weights else None
        if spec.device == "cpu":
            cpu_kernels.use_kernels()
            if spec.spans_ranks:
                _name_shared_memory_by_port()
        try:
            self.llm = LLM(
                spec.model,
                dtype=spec.dtype,
                # Scoring asks for one token more than it is given, and throws it away.
                max_model_len=spec.max_model_len + 1,
                # vLLM wants room for a token of every sequence in a pass.
                max_num_seqs=min(spec.max_num_seqs, spec.chunk_tokens or spec.max_num_seqs),
                # Rollouts share prompts; scoring must not cache.
                enable_prefix_caching=takes_weights,
                logprobs_mode="processed_logprobs",
                max_logprobs=max(ModelConfig.max_logprobs, spec.max_top_k),
                # A bfloat16 head rounds logits of 16 and more to steps of 0.125 nats, beyond PEAR's
                # low clip; the trainer computes them in float32, and so must the engine.
                hf_overrides={"head_dtype": "float32"},
                weight_transfer_config=transfer,
                **_adapter_options(spec),
                disable_log_stats=True,
                seed=spec.seed,
                **_device_options(spec),
            )
        except (RuntimeError, ValueError, OSError) as error:
            raise EngineError(
                f"{spec.model}: vLLM could not start an engine ({type(error).__name__}: {error}); "
                "`pear doctor` starts one on the embedded model and shows what is missing"
            ) from error
        if spec.device == "cpu" and (spec.tensor_parallel_size == 1 or spec.spans_ranks):
            self.llm.collective_rpc(lighten)  # the worker is in this process
        self.tokenizer = self.llm.get_tokenizer()
        self._asleep: set[Memory] = set()
        self._adapter: LoRARequest | None = None  # that requests are answered with

    def sleep(self) -> None:
        """Give the GPU's memory back, the weights' and the cache's; nothing on a CPU.

        Nothing is kept: after waking, weights are to be published before anything is asked.
        """
        if self.spec.sleeps and not self._asleep:
            self.llm.sleep(level=2)
            self._asleep = {"weights", "kv_cache"}

    def wake(self, memory: Memory) -> None:
        """Take memory again: the weights' before they are published, the cache's after that."""
        if memory in self._asleep:
            self.llm.wake_up(tags=[memory])
            self._asleep.remove(memory)

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sequence[Sampling]
    ) -> list[list[Completion]]:
        """`num_samples` completions of each prompt, in the order of `prompts`.

        Args:
            prompts: Token ids per prompt.
            sampling: One per prompt. A seed makes the samples independent of what else is in the
                batch, but for rounding.

        Raises:
            EngineError: The engine sleeps; vLLM would never answer.
        """
        self._check_awake()
        # What earlier calls left would be read instead of computed, in which rounding differs:
        # a call answers the same whatever the engine did before.
        self.llm.reset_prefix_cache()
        params = [
            SamplingParams(
                n=each.num_samples,
                temperature=each.temperature,
                max_tokens=each.max_tokens,
                seed=each.seed,
                logprobs=0,
                flat_logprobs=True,
                detokenize=False,
            )
            for each in sampling
        ]
        requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        outputs = self.llm.generate(requests, params, use_tqdm=False, lora_request=self._adapter)
        return [[self._completion(sample) for sample in output.outputs] for output in outputs]

    def end_tokens(self) -> list[str]:
        """The tokens at which a completion ends: the tokenizer's, and generation_config.json's."""
        found = self.llm.model_config.try_get_generation_config().get("eos_token_id") or []
        ids = [found] if isinstance(found, int) else found
        ends = dict.fromkeys([self.tokenizer.eos_token_id, *ids])
        return self.tokenizer.convert_ids_to_tokens(list(ends))

    def score(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Natural-log probability of each id given those before it, float32 [seq] per sequence.

        The first entry is 0: nothing precedes it. Ids must be inside the vocabulary and sequences
        no longer than `max_model_len`; callers check, because one bad row makes vLLM refuse the
        batch.

        Raises:
            OutOfMemoryError: Memory did not do for so many at once; fewer may be tried.
            EngineError: The engine returned another number of log-probs than ids.
        """
        scored = []
        for _, logprobs in self._candidates(sequences, top_k=0):
            scored.append(np.zeros(len(logprobs) + 1, dtype=np.float32))
            scored[-1][1:] = logprobs[:, 0]
        return scored

    def score_top(self, rows: Sequence[MaskedIds], *, top_k: int) -> list[TopLogprobs]:
        """What `score` gives, and for each loss token `top_k` candidates; for it all else holds.

        Args:
            rows: Sequences, and which of their tokens train.
            top_k: At least 1, and at most the spec's `max_top_k` and the vocabulary.
        """
        found: list[TopLogprobs] = []
        for part in within_tokens(rows, CANDIDATES_AT_ONCE // (1 + top_k)):
            candidates = self._candidates([row.token_ids for row in part], top_k=top_k)
            found += [
                select_top(ids, logprobs, row.loss_mask)
                for row, (ids, logprobs) in zip(part, candidates, strict=True)
            ]
        return found

    def weight_sender(self, policy: Policy) -> "weights.WeightSender | AdapterSender":
        """The channel from `policy` (plain or FSDP2-sharded) into this engine.

        An engine that takes adapters was started on their base, and answers with them from here on:
        it is asked for nothing before the first sync.
        """
        self._adapter = None
        if not self.spec.max_lora_rank or policy.frozen_base is None:
            return weights.WeightSender(self.llm, policy)
        # peft is an extra that an install need not have, and seconds to import.
        from pear_ray.engines.vllm.adapters import ADAPTER, AdapterSender  # noqa: PLC0415

        self._adapter = ADAPTER
        return AdapterSender(self.llm, policy)

    def _candidates(
        self, sequences: Sequence[Sequence[int]], *, top_k: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Of each sequence what `prompt_candidates` gives, one after the other."""
        self._check_awake()
        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            prompt_logprobs=top_k,
            flat_logprobs=True,
            detokenize=False,
            skip_clone=True,  # nobody changes it; a deep copy per row took 3 % of the time
        )
        requests = [{"prompt_token_ids": list(ids)} for ids in sequences]
        with self._nothing_left_behind():
            outputs = self.llm.generate(
                requests, params, use_tqdm=False, lora_request=self._adapter
            )
        for output, ids in zip(outputs, sequences, strict=True):
            yield prompt_candidates(output.prompt_logprobs, ids, top_k=top_k)

    def _check_awake(self) -> None:
        if self._asleep:
            raise EngineError(
                f"the engine sleeps ({', '.join(sorted(self._asleep))}); wake it and publish "
                "weights first"
            )

    @contextlib.contextmanager
    def _nothing_left_behind(self) -> Iterator[None]:
        """Drop the requests of a call that failed: the next would answer them beside its own.

        Raises:
            OutOfMemoryError: That is what failed.
        """
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            waiting = list(self.llm.llm_engine.output_processor.request_states)
            self.llm.llm_engine.abort_request(waiting, internal=True)
            if not _is_out_of_memory(error):
                raise
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            raise OutOfMemoryError(str(error)) from error

    def _completion(self, sample: CompletionOutput) -> Completion:
        token_ids = list(sample.token_ids)
        return Completion(
            token_ids=token_ids,
            behavior_logprobs=chosen_logprobs(sample.logprobs, token_ids),
            text=self.tokenizer.decode(token_ids, skip_special_tokens=True),
            finish_reason=FinishReason(sample.finish_reason),
        )


def _name_shared_memory_by_port() -> None:
    """Give the memory that an engine's ranks share a name that no other group of ranks has.

    vLLM 0.32 takes the name from an address, which is always `env://` here: what a killed run left
    behind, and any other run beside it, would keep the engine from starting.
    """
    cpu_communicator._CPUSHMDistributed.make_group_name = staticmethod(  # noqa: SLF001
        lambda communicator: (
            f"/{os.environ['MASTER_PORT']}{_vllms_name(communicator).removeprefix('//')}"
        )
    )


def _is_out_of_memory(error: Exception) -> bool:
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or any(each in str(error).lower() for each in words)


def _adapter_options(spec: EngineSpec) -> dict[str, object]:
    if not spec.max_lora_rank:
        return {}
    room = next(rank for rank in get_args(MaxLoRARanks) if rank >= spec.max_lora_rank)
    return {"enable_lora": True, "max_loras": 1, "max_cpu_loras": 1, "max_lora_rank": room}


def _device_options(spec: EngineSpec) -> dict[str, object]:
    common: dict[str, object] = {}
    if spec.chunk_tokens:
        common = {"enable_chunked_prefill": True, "max_num_batched_tokens": spec.chunk_tokens}
    if spec.tensor_parallel_size > 1:
        # Inside a Ray actor vLLM would take Ray for its workers, and ask it for devices anew.
        common |= {
            "tensor_parallel_size": spec.tensor_parallel_size,
            "distributed_executor_backend": "external_launcher" if spec.spans_ranks else "mp",
        }
    if spec.cache_gib is not None:
        common["kv_cache_memory_bytes"] = spec.cache_gib * 2**30
    if spec.device == "cuda":
        return {
            # Of a cache of fixed size it is only what vLLM wants to find free before it begins.
            "gpu_memory_utilization": spec.gpu_memory_fraction if spec.cache_gib is None else 0.01,
            "enforce_eager": spec.eager,
            "enable_sleep_mode": spec.sleeps,
            **common,
        }
    if spec.chunk_tokens:
        return {"enforce_eager": True, **common}
    return {
        "enforce_eager": True,
        # A seeded request whose prompt is cut over two batches fails on CPU in vLLM 0.32 (it
        # rewinds the generator, which only CUDA's can do): whole prompts only.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(CPU_BATCHED_TOKENS, spec.max_model_len + 1),
        "block_size": CPU_BLOCK_TOKENS,
        "scheduler_cls": LeanScheduler,
        **common,
    }
