"""What a vLLM engine holds: weights, KV cache, and what a pass through it adds."""

from dataclasses import dataclass

from pear_ray.engines.vllm.spec import CANDIDATES_AT_ONCE, CPU_BATCHED_TOKENS, MAX_NUM_SEQS
from pear_ray.memory.items import GIB, Item, Moment, Shortage, moment, size
from pear_ray.memory.model_shape import ModelShape

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
KV_CACHE = "cluster.kv_cache_gib"
GPU_SHARE = "cluster.gpu_memory_fraction"
# Float32 logits, their log-softmax, and one byte each while ranks are counted: what scoring was
# measured to stay below (benchmarks/results/score.json). Sampling on CPU holds the same three.
BYTES_PER_LOGIT = 9
BYTES_PER_CANDIDATE = 8  # its id and its log-prob, as they are written
BYTES_PER_LOGPROB = 130  # of the four Python objects that vLLM makes of each, until a call ends


@dataclass(frozen=True, slots=True, kw_only=True)
class EnginePlan:
    """One engine.

    Attributes:
        shape: The model's shape.
        dtype: As `models.dtype`.
        device: `cpu` or `cuda`.
        max_model_len: Longest sequence, in tokens.
        kv_cache_gib: KV cache on CPU, in GiB.
        gpu_memory_fraction: Share of the GPU's memory that the engine takes, on CUDA.
        device_bytes: The GPU's memory, on CUDA; None where it is not known.
        chunk_tokens: Most tokens of a pass while scoring; None for an engine that samples.
        num_sequences: Sequences of one call.
        top_k: Candidates besides its own that each token is scored with.
        tensor_parallel_size: Devices that the model is split over; sizes are of one of them.
        parallel_setting: The setting that says so, where there is one.
    """

    shape: ModelShape
    dtype: str
    device: str
    max_model_len: int
    kv_cache_gib: int
    gpu_memory_fraction: float
    device_bytes: int | None
    chunk_tokens: int | None = None
    num_sequences: int = MAX_NUM_SEQS
    top_k: int = 0
    tensor_parallel_size: int = 1
    parallel_setting: str | None = None

    @property
    def bytes_each(self) -> int:
        """Bytes of a weight or an activation."""
        return DTYPE_BYTES[self.dtype]

    @property
    def pass_tokens(self) -> int:
        """Most tokens of one pass."""
        return self.chunk_tokens or max(CPU_BATCHED_TOKENS, self.max_model_len + 1)


def kv_bytes_per_token(plan: EnginePlan) -> int:
    """Bytes of one token's keys and values in all layers, on one device."""
    heads = max(1, plan.shape.num_key_value_heads // plan.tensor_parallel_size)
    return 2 * plan.shape.num_layers * heads * plan.shape.head_dim * plan.bytes_each


def least_kv_bytes(plan: EnginePlan) -> int:
    """What vLLM wants at least: one longest sequence, and scoring asks for one token more."""
    return kv_bytes_per_token(plan) * (plan.max_model_len + 1)


def engine_resident(plan: EnginePlan) -> list[Item]:
    """What an engine keeps for as long as it lives."""
    if plan.device == "cuda" and plan.device_bytes is not None:
        share = int(plan.gpu_memory_fraction * plan.device_bytes)
        return [
            Item(
                name="vLLM's share of the GPU",
                num_bytes=share,
                formula=f"{GPU_SHARE}={plan.gpu_memory_fraction:g} x {size(plan.device_bytes)}, "
                "with weights, passes and KV cache in it",
                setting=GPU_SHARE,
            )
        ]
    return [engine_weights(plan), *_packed(plan), _kv_cache(plan)]


def engine_scoring(plan: EnginePlan) -> list[Moment]:
    """Moments of a pass that scores, without the engine itself."""
    tokens = plan.pass_tokens
    logits = Item(
        name="logits of a chunk",
        num_bytes=BYTES_PER_LOGIT * tokens * plan.shape.vocab_size,
        formula=f"{BYTES_PER_LOGIT} bytes x {tokens:,} tokens "
        f"x {plan.shape.vocab_size:,} vocabulary",
        setting="score.chunk_tokens",
    )
    num_logprobs = plan.num_sequences * plan.max_model_len
    candidates = num_logprobs * plan.top_k
    if plan.top_k:  # rows go in parts
        least = plan.max_model_len * (1 + plan.top_k)
        num_logprobs = min(num_logprobs + candidates, max(CANDIDATES_AT_ONCE, least))
    kept = Item(
        name="log-probs of a block, as vLLM keeps them",
        # In the host's memory, wherever the engine computes.
        num_bytes=BYTES_PER_LOGPROB * num_logprobs if plan.device == "cpu" else 0,
        formula=f"{BYTES_PER_LOGPROB} bytes x {num_logprobs:,} tokens",
        setting="score.rows_per_block",
    )
    found = Item(
        name="candidates of a block",
        num_bytes=BYTES_PER_CANDIDATE * candidates if plan.device == "cpu" else 0,
        formula=f"{BYTES_PER_CANDIDATE} bytes x {candidates:,}",
        setting="score.top_k",
    )
    states = _states(plan, "score.chunk_tokens")
    moments = [
        _through_layers(plan, "score.chunk_tokens"),
        *_heads(plan, tokens, [states, logits]),
    ]
    return [moment(each.name, [kept, found], each.items) for each in moments]


def engine_sampling(plan: EnginePlan) -> list[Moment]:
    """Moments of a pass that samples, without the engine itself."""
    num = min(plan.num_sequences, MAX_NUM_SEQS)
    logits = Item(
        name="logits of the sequences",
        num_bytes=BYTES_PER_LOGIT * num * plan.shape.vocab_size,
        formula=f"{BYTES_PER_LOGIT} bytes x {num} sequences x {plan.shape.vocab_size:,} vocabulary",
    )
    return [_through_layers(plan, None), *_heads(plan, num, [_states(plan, None), logits])]


def engine_reload(plan: EnginePlan) -> list[Item]:
    """What vLLM holds while it takes new weights: its largest layer a second time, and repacked."""
    size = plan.shape.embedding_parameters
    copies = 2 if plan.device == "cpu" else 1
    return [
        Item(
            name="engine's embedding while it is loaded again",
            num_bytes=copies * plan.bytes_each * size,
            formula=f"{copies} x {plan.bytes_each} bytes x {size:,} parameters of the embedding",
        )
    ]


def engine_shortage(plan: EnginePlan) -> Shortage | None:
    """What vLLM would refuse to start with: a KV cache for less than one longest sequence.

    On a GPU the cache is what weights and a pass leave of the engine's share. Or heads that do not
    split over the engine's devices.
    """
    heads, devices = plan.shape.num_heads, plan.tensor_parallel_size
    if heads % devices and plan.parallel_setting:
        words = f"{plan.parallel_setting}={devices} does not divide its {heads} attention heads"
        return Shortage(plan.parallel_setting, words)
    needed = least_kv_bytes(plan)
    one = f"one sequence of models.max_model_len={plan.max_model_len}"
    if plan.device == "cpu":
        if needed <= plan.kv_cache_gib * GIB:
            return None
        return Shortage(
            KV_CACHE, f"{KV_CACHE}={plan.kv_cache_gib} GiB, and {one} needs {size(needed)}"
        )
    if plan.device_bytes is None:
        return None
    share = int(plan.gpu_memory_fraction * plan.device_bytes)
    passes = engine_scoring(plan) if plan.chunk_tokens else engine_sampling(plan)
    rest = share - engine_weights(plan).num_bytes - max(each.num_bytes for each in passes)
    if rest >= needed:
        return None
    return Shortage(
        GPU_SHARE,
        f"{GPU_SHARE}={plan.gpu_memory_fraction:g} is {size(share)}, of which weights and a pass "
        f"leave {size(max(0, rest))} for the KV cache, and {one} needs {size(needed)}",
    )


def engine_weights(plan: EnginePlan) -> Item:
    """What the engine's weights take; of a quantised model as they are in its file."""
    if plan.shape.quantised_bytes is not None:
        size = plan.shape.quantised_bytes // plan.tensor_parallel_size
        return Item(name="engine's weights", num_bytes=size, formula="the quantised tensors' size")
    total, each, devices = plan.shape.num_parameters, plan.bytes_each, plan.tensor_parallel_size
    return Item(
        name="engine's weights",
        num_bytes=each * total // devices,
        formula=f"{each} bytes x {total:,} parameters{_over(plan)}",
        setting=plan.parallel_setting,
    )


def _packed(plan: EnginePlan) -> list[Item]:
    """On CPU vLLM packs linear layers in place, but embedding and head beside themselves."""
    if plan.device != "cpu":
        return []
    size = plan.shape.embedding_parameters
    return [
        Item(
            name="packed copies of embedding and head",
            num_bytes=2 * plan.bytes_each * size // plan.tensor_parallel_size,
            formula=f"2 x {plan.bytes_each} bytes x {size:,} parameters, tied or not{_over(plan)}",
        )
    ]


def _over(plan: EnginePlan) -> str:
    devices = plan.tensor_parallel_size
    return f" / {devices} devices" if devices > 1 else ""


def _kv_cache(plan: EnginePlan) -> Item:
    if plan.device == "cpu":
        return Item(
            name="KV cache",
            num_bytes=plan.kv_cache_gib * GIB,
            formula=f"{KV_CACHE}={plan.kv_cache_gib}, room for "
            f"{plan.kv_cache_gib * GIB // kv_bytes_per_token(plan):,} tokens",
            setting=KV_CACHE,
        )
    return Item(
        name="KV cache, at least",
        num_bytes=least_kv_bytes(plan),
        formula=f"{kv_bytes_per_token(plan):,} bytes x {plan.max_model_len + 1:,} tokens",
        setting="models.max_model_len",
    )


def _states(plan: EnginePlan, setting: str | None) -> Item:
    size = plan.shape.hidden_size * plan.bytes_each
    return Item(
        name="hidden states",
        num_bytes=size * plan.pass_tokens,
        formula=f"{size:,} bytes x {plan.pass_tokens:,} tokens",
        setting=setting,
    )


def _through_layers(plan: EnginePlan, setting: str | None) -> Moment:
    """An MLP at its widest: residual stream, its normed copy, gate and up, their product."""
    inner = 3 * plan.shape.intermediate_size // plan.tensor_parallel_size
    per_token = (2 * plan.shape.hidden_size + inner) * plan.bytes_each
    inside = Item(
        name="activations of a pass",
        num_bytes=per_token * plan.pass_tokens,
        formula=f"{per_token:,} bytes x {plan.pass_tokens:,} tokens",
        setting=setting,
    )
    return moment("a pass through the engine", [inside])


def _heads(plan: EnginePlan, num_logits: int, items: list[Item]) -> list[Moment]:
    """The log-softmax; in bfloat16 on CPU before it the product, whose head is cast to float32."""
    moments = [moment("log-probs in the engine", items)]
    if plan.device == "cpu" and plan.bytes_each < DTYPE_BYTES["float32"]:
        size, vocab = plan.shape.embedding_parameters, plan.shape.vocab_size
        cast = Item(
            name="head cast to float32",
            num_bytes=4 * size,
            formula=f"4 bytes x {size:,} parameters of the head, in every pass",
        )
        logits = Item(
            name="logits as they are made",
            num_bytes=4 * num_logits * vocab,
            formula=f"4 bytes x {num_logits:,} tokens x {vocab:,} vocabulary",
            setting=items[-1].setting,
        )
        moments.append(moment("logits in the engine", [items[0], cast, logits]))
    return moments
