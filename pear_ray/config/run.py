"""A run: the root section, and how a YAML file plus overrides becomes one."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError, model_validator

from pear_ray.config.backends import PARAMETERS_SPLIT
from pear_ray.config.base import Section
from pear_ray.config.corpus import CorpusConfig, SampledCorpus, ScoreConfig
from pear_ray.config.evaluate import EvaluateConfig, Suite, suites_of
from pear_ray.config.explain import explain
from pear_ray.config.ready import ReadyConfig
from pear_ray.config.rl import RlConfig
from pear_ray.config.sections import ClusterConfig, ModelsConfig, TelemetryConfig
from pear_ray.config.sft import SftConfig
from pear_ray.config.yaml12 import YamlError, parse
from pear_ray.errors import ConfigError

# What problems are of, and a verifier that fits them.
_NOT_GAMES = {"file": ("a file", "exact"), "hub": ("the hub", "math")}


class RunConfig(Section):
    """Everything one run needs to know."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Names the run's folder under `output_dir`; equals the run file's stem."""
    output_dir: str = "outputs"
    """Where every run's folder goes: a path that every node reaches, or s3://BUCKET/FOLDER."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of sampling, shuffling and initialisation."""
    models: ModelsConfig
    """Which models the run starts from."""
    corpus: CorpusConfig
    """The offline corpus."""
    score: ScoreConfig = ScoreConfig()
    """Behavior log-probs of the corpus."""
    sft: SftConfig
    """PEAR-weighted SFT."""
    ready: ReadyConfig = ReadyConfig()
    """The readiness report, between SFT and RL."""
    rl: RlConfig
    """GRPO."""
    evaluate: EvaluateConfig
    """Evaluation of every checkpoint."""
    cluster: ClusterConfig = ClusterConfig()
    """The Ray cluster and what each worker takes of it."""
    telemetry: TelemetryConfig = TelemetryConfig()
    """Where numbers go."""

    @model_validator(mode="after")
    def _splits_over_ranks(self) -> "RunConfig":
        ranks = self.cluster.num_trainers
        for field, count in (
            ("rl.prompts_per_step", self.rl.prompts_per_step),
            ("sft.global_batch_size", self.sft.global_batch_size),
        ):
            if count % ranks:
                raise ValueError(
                    f"{field}={count} does not split over cluster.num_trainers={ranks} ranks; "
                    f"make it a multiple of {ranks}, or set cluster.num_trainers to a divisor"
                )
        shared = {"rl": self.rl.tensor_parallel_size}
        if self.sft.pass_at_k is not None:
            shared["evaluate"] = self.evaluate.tensor_parallel_size
        for stage, size in shared.items():
            if ranks % size:
                raise ValueError(
                    f"{stage}.tensor_parallel_size={size} does not divide cluster.num_trainers="
                    f"{ranks}, whose ranks share the engines; use a divisor"
                )
        updates = self.rl.updates_per_batch
        if self.rl.prompts_per_step % (ranks * updates):
            raise ValueError(
                f"rl.prompts_per_step={self.rl.prompts_per_step} groups do not split over "
                f"rl.updates_per_batch={updates} updates of cluster.num_trainers={ranks} ranks; "
                f"make it a multiple of {ranks * updates}"
            )
        return self

    @model_validator(mode="after")
    def _engine_takes_adapters(self) -> "RunConfig":
        rl = self.rl
        if rl.lora is None or rl.lora.sync == "merged":
            return self
        if rl.tensor_parallel_size > 1:
            raise ValueError(
                f"rl.lora.sync=adapter is for engines on one device, and rl.tensor_parallel_size="
                f"{rl.tensor_parallel_size} spreads them; use merged"
            )
        if self.cluster.device == "cuda" and rl.colocation.sleep:
            raise ValueError(
                "rl.lora.sync=adapter wants an engine that keeps its base, and with "
                "rl.colocation.sleep=true it drops all weights in every step; use merged, or set "
                "rl.colocation.sleep=false"
            )
        return self

    @model_validator(mode="after")
    def _backend_fits(self) -> "RunConfig":
        backend, cluster = self.sft.backend, self.cluster
        if backend.kind == "fsdp" and cluster.num_trainers % (backend.shard_over or 1):
            raise ValueError(
                f"sft.backend.shard_over={backend.shard_over} does not divide cluster.num_trainers="
                f"{cluster.num_trainers}; use a divisor, or leave it out to split over all ranks"
            )
        offloads = backend.kind == "fsdp" and backend.cpu_offload
        if offloads and cluster.device == "cpu":
            raise ValueError(
                "sft.backend.cpu_offload=true moves parameters off a GPU, and cluster.device=cpu "
                "has none; leave it out"
            )
        if (
            backend.kind == "deepspeed"
            and backend.offload == "all"
            and backend.zero_stage != PARAMETERS_SPLIT
        ):
            raise ValueError(
                "sft.backend.offload=all wants parameters that are split, and zero_stage="
                f"{backend.zero_stage} keeps them whole; set sft.backend.zero_stage="
                f"{PARAMETERS_SPLIT}, or offload=optimizer"
            )
        return self

    @model_validator(mode="after")
    def _has_behavior(self) -> "RunConfig":
        if self.models.behavior is not None:
            return self
        if self.corpus.kind == "sampled":
            raise ValueError(
                "models.behavior is missing, and corpus.kind=sampled wants a model that answers; "
                "name it"
            )
        if self.score.given != "keep":
            raise ValueError(
                "models.behavior is missing, so the corpus cannot be scored; name the model that "
                "wrote it, or set score.given=keep where every row brings its log-probs"
            )
        if self.score.top_k or self.models.align == "bytes":
            raise ValueError(
                "models.behavior is missing, and score.top_k and models.align=bytes want such a "
                "model; name it, or leave them out"
            )
        return self

    @model_validator(mode="after")
    def _aligned_weights(self) -> "RunConfig":
        weights, align = self.sft.weights, self.models.align
        if align == "bytes" and self.corpus.kind == "sampled":
            raise ValueError(
                "models.align=bytes is for chats that are there as text (corpus.kind=dataset); a "
                "sampled corpus wants behavior models with the policy's tokenizer"
            )
        if self.score.top_k and align == "bytes":
            raise ValueError(
                f"score.top_k={self.score.top_k} wants candidates that are ids of the policy, and "
                "with models.align=bytes the behavior models have ids of their own; set it to 0, "
                "or choose behavior models with the policy's tokenizer"
            )
        spans = ("span", "sequence")
        if align == "bytes" and self.corpus.kind == "dataset" and self.corpus.too_long == "cut":
            raise ValueError(
                "corpus.too_long=cut parts a chat from the text that models.align=bytes aligns; "
                "use drop"
            )
        if weights.kind == "pear" and align == "bytes" and weights.level not in spans:
            raise ValueError(
                f"sft.weights.level={weights.level} needs a log-prob per token, and "
                "models.align=bytes has one per span only; set it to span or sequence"
            )
        if weights.kind == "pear" and align == "bytes" and weights.rescale == "centred":
            raise ValueError(
                "sft.weights.rescale=centred wants a log-ratio per token, and models.align=bytes "
                "has one per span only; use sequence_mean_one or batch_mean_one"
            )
        if weights.kind == "pear" and align != "bytes" and weights.level == "span":
            raise ValueError(
                "sft.weights.level=span is for models.align=bytes; use token, block or sequence"
            )
        return self

    @model_validator(mode="after")
    def _objective_has_what_it_reads(self) -> "RunConfig":
        if self.sft.objective.kind == "forward_kl" and not self.score.top_k:
            raise ValueError(
                "sft.objective=forward_kl compares with the behavior model's candidates, and "
                "score.top_k=0 keeps none; set score.top_k, e.g. to 20"
            )
        if self.sft.negatives is not None and self.models.align == "bytes":
            raise ValueError(
                "sft.negatives wants a log-prob per token, and models.align=bytes has one per "
                "span; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _average_is_kept(self) -> "RunConfig":
        sft = self.sft
        by_ratio = sft.weights.kind == "pear" and sft.weights.ratio_policy == "ema"
        for key, wanted in (("weights.ratio_policy", by_ratio), ("export", sft.export == "ema")):
            if wanted and sft.ema_decay is None:
                raise ValueError(
                    f"sft.{key}=ema wants an average of the weights, and sft.ema_decay keeps none; "
                    "set it, e.g. to 0.99"
                )
        if sft.ema_decay is not None and sft.backend.kind == "deepspeed":
            raise ValueError(
                "sft.ema_decay is not there with sft.backend.kind=deepspeed; use fsdp or ddp"
            )
        if sft.compile and sft.backend.kind == "deepspeed":
            raise ValueError(
                "sft.compile=true is for sft.backend.kind=fsdp and ddp: the hooks that DeepSpeed "
                "puts inside layers would be compiled with them; set it to false, or use another"
            )
        return self

    @model_validator(mode="after")
    def _enough_samples(self) -> "RunConfig":
        for suite in suites_of(self.evaluate):
            largest = max(suite.k)
            if largest > suite.num_samples:
                raise ValueError(
                    f"{suite.key}.k={largest} needs at least that many samples, but "
                    f"{suite.key}.num_samples={suite.num_samples}; raise it or drop that k"
                )
        return self

    @model_validator(mode="after")
    def _games_have_their_verifier(self) -> "RunConfig":
        for stage, each in verified_sections(self).items():
            kinds = [component.kind for component in each.rewards.components]
            if each.problems.kind != "games" and "game" in kinds:
                source, other = _NOT_GAMES[each.problems.kind]
                raise ValueError(
                    f"{stage}.problems are of {source}, and {stage}.rewards.components has kind "
                    "game, which verifies games alone; name another, e.g. "
                    f"{stage}.rewards.components=[{{kind: {other}}}]"
                )
        return self

    @model_validator(mode="after")
    def _enough_problems(self) -> "RunConfig":
        main = suites_of(self.evaluate)[0]
        size = main.problems.size
        for stage, settings in (("sft", self.sft.pass_at_k), ("rl", self.rl.pass_at_k)):
            if size and settings is not None and (settings.num_problems or 0) > size:
                raise ValueError(
                    f"{stage}.pass_at_k.num_problems={settings.num_problems} wants more than the "
                    f"{main.key}.problems.size={size} there are; lower it, or leave it out for all"
                )
        return self


def verified_sections(config: RunConfig) -> dict[str, SampledCorpus | RlConfig | Suite]:
    """The sections with problems and rewards, by key."""
    sampled = {"corpus": config.corpus} if isinstance(config.corpus, SampledCorpus) else {}
    return {**sampled, "rl": config.rl} | {each.key: each for each in suites_of(config.evaluate)}


def load_run(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read `path`, apply `overrides` (`sft.num_epochs=2`, left to right), and validate.

    Raises:
        ConfigError: The file is missing or not YAML, or a key or value cannot be used. All problems
            are listed at once, each with its dotted key and, for an unknown key, the nearest known
            one.
    """
    tree = read_tree(path)
    for override in overrides:
        apply_override(tree, override)
    return validate_run(tree, origin=str(path))


def read_tree(path: Path, *, noun: str = "run file") -> dict[str, Any]:
    """What the YAML file at `path` says; `noun` is what an error calls it.

    Raises:
        ConfigError: It is missing, not YAML, or no mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot read the {noun} ({error.strerror}); shipped ones are in jobs/runs/"
        ) from error
    try:
        tree = parse(text)
    except YamlError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping at the top, got {type(tree).__name__}")
    return tree


def validate_run(tree: dict[str, Any], *, origin: str) -> RunConfig:
    """The config that `tree` spells; `origin` begins the error message."""
    try:
        return RunConfig.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        problems = "\n".join(explain(error, RunConfig))
        count = error.error_count()
        noun = "problem" if count == 1 else "problems"
        raise ConfigError(f"{origin}: {count} {noun}\n{problems}") from error


def dump_run(config: RunConfig) -> str:
    """The fully resolved config as YAML that `load_run` reads back to the same config."""
    tree = json.loads(config.model_dump_json())
    # JSON strings and numbers keep YAML 1.1 and 1.2 readers in agreement on `on`, `1e-5` and
    # `null`.
    return yaml.dump(tree, Dumper=_QuotingDumper, sort_keys=False, allow_unicode=True)


class _QuotingDumper(yaml.SafeDumper):
    """SafeDumper that quotes every string value and writes floats so that YAML 1.2 reads floats."""


def _quoted(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"')


def _float(dumper: yaml.SafeDumper, number: float) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:float", repr(number))


_QuotingDumper.add_representer(str, _quoted)
_QuotingDumper.add_representer(float, _float)


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set in `tree` what `override` (`sft.num_epochs=2`) says.

    Raises:
        ConfigError: It is not of that form, or its key leads into a value.
    """
    dotted, value = read_override(override)
    set_key(tree, dotted, value, said_by=override)


def read_override(override: str) -> tuple[str, Any]:
    """The dotted key and the value that `override` (`sft.num_epochs=2`) says.

    Raises:
        ConfigError: It is not of that form.
    """
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise ConfigError(f"override {override!r}: expected key.path=value, as in sft.num_epochs=2")
    try:
        return dotted, parse(text)
    except YamlError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {error}") from error


def set_key(tree: dict[str, Any], dotted: str, value: Any, *, said_by: str) -> None:
    """Set the value at a dotted key of `tree`; sections on the way are made.

    Raises:
        ConfigError: The key leads into a value, or beside a list's items.
    """
    node: Any = tree
    *parents, leaf = dotted.split(".")
    for parent in parents:
        node = _step_into(node, parent, said_by)
    if isinstance(node, list):
        node[_index(node, leaf, said_by)] = value
    elif isinstance(node, dict):
        node[leaf] = value
    else:
        raise ConfigError(f"override {said_by!r}: {parents[-1]!r} is a value, not a section")


def _step_into(node: Any, key: str, override: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, key, override)]
    if not isinstance(node, dict):
        raise ConfigError(
            f"override {override!r}: the part before {key!r} is a value, not a section"
        )
    if node.get(key) is None:
        node[key] = {}
    return node[key]


def _index(items: list[Any], key: str, override: str) -> int:
    if key.isdigit() and int(key) < len(items):
        return int(key)
    raise ConfigError(
        f"override {override!r}: {key!r} is not an index into a list of {len(items)}; count from 0"
    )
