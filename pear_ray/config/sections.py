"""Models, cluster, telemetry: the sections that several stages share."""

from typing import Annotated, Literal

from pydantic import Field

from pear_ray.config.base import Section


class ModelsConfig(Section):
    """Which models the run starts from."""

    policy: str
    """The model to train: a folder with safetensors and a tokenizer, a hub name, or
    `embedded:student`."""
    behavior: str | dict[str, str] | None = None
    """The model whose distribution the corpus comes from: a folder, a hub name, or
    `embedded:teacher`; where several wrote it, one for each `source` of the corpus. None: every row
    brings its log-probs, and `score.given: keep` keeps them."""
    align: Literal["refuse", "bytes"] = "refuse"
    """What becomes of a behavior model with another tokenizer: refused, or scored on its own ids of
    the same chats, its log-probs going to the spans of bytes that both tokenizations share. That
    is ours, not the paper's; PEAR's weights then have `level: span` or `sequence`."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Computation dtype of the vLLM engines, and of training on CUDA. Weights in training are kept
    in float32, and on CPU training computes in it as well."""
    max_model_len: Annotated[int, Field(gt=1)] = 2048
    """Longest prompt plus completion, in tokens."""


def compute_dtype(dtype: str, *, device: str) -> str:
    """What training's forward and backward passes compute in, with `dtype` as `models.dtype`.

    bfloat16 on CUDA only. CPUs without matrix instructions for it crawl: an SFT step of
    SmolLM2-135M took 100 s in it.
    """
    return dtype if device == "cuda" else "float32"


class ClusterConfig(Section):
    """The Ray cluster and what each worker takes of it."""

    address: str | None = None
    """`HOST:PORT` of a running cluster's head (`auto` on a node of it). None: that of RAY_ADDRESS,
    or a Ray that ends with the run. A submitted job stays on the cluster it was sent to."""
    device: Literal["cpu", "cuda"] = "cpu"
    """What engines and trainers compute on."""
    num_trainers: Annotated[int, Field(gt=0)] = 2
    """Workers of the SFT and RL groups: one share of the model each and, in RL, one vLLM engine
    each."""
    num_samplers: Annotated[int, Field(gt=0)] = 2
    """Engine actors for collecting, scoring and evaluating."""
    min_samplers: Annotated[int, Field(gt=0)] | None = None
    """Engine actors that collecting, scoring and evaluating begin with; they grow to `num_samplers`
    as devices appear. None: `num_samplers` from the start."""
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1.0
    """CPUs each trainer or engine actor asks Ray for; also its number of compute threads, at least
    one."""
    training_nodes: Literal["on_demand", "any"] = "on_demand"
    """Where `sft`, `ready` and `rl` run. `on_demand`: not on nodes that are labelled
    `ray.io/market-type: spot` and may be taken back; a node without the label will do. Collecting,
    scoring and evaluating run anywhere."""
    gpu_memory_fraction: Annotated[float, Field(gt=0, le=1)] = 0.85
    """Share of a GPU's memory that a vLLM engine may take (CUDA only)."""
    enforce_eager: bool = False
    """Start vLLM engines without compiling the model and without CUDA graphs (CUDA only): a minute
    sooner, and slower at every token after that."""
    kv_cache_gib: Annotated[int, Field(gt=0)] = 1
    """KV cache of a vLLM engine on CPU, or with `shares_gpu`, in GiB."""
    shares_gpu: bool = False
    """Whether other runs use the same GPU. An engine then takes `kv_cache_gib` of cache instead of
    `gpu_memory_fraction`, and does not sleep: vLLM can neither measure free memory nor what it gave
    back while others come and go. `pear study` sets it where `gpus_per_run` is below 1."""
    max_failures: Annotated[int, Field(ge=0)] = 2
    """How often a worker group is restarted from its last checkpoint, or an engine that collects or
    evaluates is replaced, before the run fails."""
    stall_timeout_s: Annotated[float, Field(gt=0)] | None = 600.0
    """How long a trainer may stay in one phase of a step (sample, reward, train, sync, ...) before
    the stacks of all its threads are written to `STAGE/stacks/`; three times as long in the first
    step and while it starts. None: it may for ever."""
    on_stall: Literal["warn", "fail"] = "warn"
    """Whether the run goes on waiting then, with a warning, or ends."""
    wait_for_devices_s: Annotated[float, Field(ge=0)] | None = None
    """How long a stage waits, saying so, for devices that the cluster does not have before the run
    fails. None: for ever, but a run does not begin on a cluster that has too few and no autoscaler.
    Devices that others are using are waited for in any case."""
    wait_for_store_s: Annotated[float, Field(gt=0)] = 120.0
    """How long the end of a stage waits for a store (`output_dir`) that does not answer, before the
    run ends."""


class TelemetryConfig(Section):
    """Where numbers go besides the run folder's metrics.jsonl, which is always written."""

    trackers: list[Literal["tensorboard", "wandb", "mlflow"]] = Field(default=[])
    """Optional trackers; one that fails warns once and never fails the run."""
    project: str = "pear_ray"
    """Project (W&B) or experiment (MLflow) name."""


class OptimizerConfig(Section):
    """AdamW and its schedule."""

    learning_rate: Annotated[float, Field(ge=0)]
    """Peak learning rate. 0 leaves the weights as they are, to the bit: a run that tries a set-up
    out."""
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the steps over which the rate rises linearly from zero."""
    final_fraction: Annotated[float, Field(ge=0, le=1)] = 1.0
    """The rate at the last step relative to the peak, reached by a cosine; 1 keeps it constant."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of AdamW's first moment."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of AdamW's second moment."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are scaled down to at most this global norm."""
