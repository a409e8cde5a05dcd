"""What an engine and a sampling request are told; importing it loads no vLLM."""

from collections.abc import Mapping
from dataclasses import dataclass, field

CPU_BATCHED_TOKENS = 4096  # bounds the logits of one prefill
GATHERED_BYTES = 256 * 2**20  # of layers held whole at once: little beside any GPU, much on gloo
# Of the KV cache; vLLM takes 128 on CPU by itself. Attention reads whole blocks: at
# 7M parameters sampling 64 tokens took 10 % less. The prompts of a group share whole blocks too.
CPU_BLOCK_TOKENS = 32
MAX_NUM_SEQS = 256  # decoded at once
# vLLM keeps each as four Python objects until a call ends: about 130 bytes, so 270 MB.
CANDIDATES_AT_ONCE = 2**21


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """What an engine needs to start.

    Attributes:
        model: Folder with safetensors and a tokenizer.
        dtype: Computation dtype, `float32` or `bfloat16`.
        max_model_len: Longest prompt plus completion, in tokens.
        device: `cpu` or `cuda`.
        gpu_memory_fraction: Share of the GPU's memory to take (CUDA only).
        max_num_seqs: Most sequences decoded at once.
        seed: Seed of the engine's own sampler; requests carry their own.
        chunk_tokens: Most tokens of one forward pass, longer prompts being cut; None leaves it to
            vLLM. It bounds the logits that scoring holds at once.
        max_top_k: Most candidates per token that scoring may ask for.
        max_lora_rank: Rank of the adapters that are published into it; 0: whole weights are.
        tensor_parallel_size: Devices that the engine is spread over, each with a process of its
            own.
        spans_ranks: Those processes are ranks of this process group, so many next to each other:
            each makes its part and they are called together, with the same arguments. Otherwise
            vLLM starts them, and the engine takes no weights.
        eager: Neither compile the model nor capture CUDA graphs (CUDA only; a CPU never does).
        sleeps: Whether `sleep` gives the GPU's memory back (CUDA only).
        cache_gib: KV cache to take, in GiB, without measuring what is free (CUDA only); None takes
            what `gpu_memory_fraction` leaves.
    """

    model: str
    dtype: str
    max_model_len: int
    device: str = "cpu"
    gpu_memory_fraction: float = 0.85
    max_num_seqs: int = MAX_NUM_SEQS
    seed: int = 0
    chunk_tokens: int | None = None
    max_top_k: int = 0
    max_lora_rank: int = 0
    tensor_parallel_size: int = 1
    spans_ranks: bool = False
    eager: bool = False
    sleeps: bool = False
    cache_gib: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSpec:
    """What a server of one model needs to start.

    Attributes:
        name: What requests call the model.
        model: Folder with safetensors, a tokenizer and a chat template.
        adapters: Folders of adapters by the name that requests call them.
        max_lora_rank: The largest rank among them.
        dtype: Computation dtype, `float32` or `bfloat16`.
        device: `cpu` or `cuda`.
        tensor_parallel_size: Devices that it is spread over, each with a process of its own.
        max_num_seqs: Most sequences decoded at once.
        ray_metrics: Give vLLM's metrics to Ray, whose exporter then has them; only inside an actor.
    """

    name: str
    model: str
    adapters: Mapping[str, str] = field(default_factory=dict)
    max_lora_rank: int = 0
    dtype: str = "bfloat16"
    device: str = "cpu"
    tensor_parallel_size: int = 1
    max_num_seqs: int = MAX_NUM_SEQS
    ray_metrics: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How completions are sampled: always from the full softmax of logits / temperature.

    Top-p and top-k are left out on purpose: they would sample from another distribution than the
    one whose log-probs the trainer computes.
    """

    num_samples: int
    temperature: float
    max_tokens: int
    seed: int
