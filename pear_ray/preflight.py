"""What must hold before any engine starts: models, vocabulary, problems, lengths, corpus file."""

import json
import math
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

from pear_ray.artifacts import manifest
from pear_ray.artifacts.rollouts import read_groups, saved_steps
from pear_ray.config.corpus import DatasetCorpus, SampledCorpus
from pear_ray.config.evaluate import suites_of
from pear_ray.config.lora import LoraConfig
from pear_ray.config.rewards import RewardConfig
from pear_ray.config.run import RunConfig
from pear_ray.config.spans import SPAN_SETTINGS, engine_span
from pear_ray.corpus.parts import find_parts
from pear_ray.engines.model_files import (
    check_prompt_ids,
    max_positions,
    model_fingerprint,
    num_attention_heads,
    resolve_behavior,
    resolve_model,
    vocab_size,
    vocabulary_fingerprint,
)
from pear_ray.errors import ConfigError, InputError, RewardError
from pear_ray.records import Problem
from pear_ray.tasks.components import check_math_installed
from pear_ray.tasks.difficulty import training_problems
from pear_ray.tasks.problem_sets import check_verifiable, evaluation_problems, make_problems
from pear_ray.tasks.reward_pool import RewardPool

T = TypeVar("T")
PADDED_TO = 64  # vLLM's DEFAULT_VOCAB_PADDING_SIZE


@dataclass(frozen=True, slots=True)
class Models:
    """The run's starting models, found and identified; behavior models by source (`*`: any)."""

    policy: Path
    behavior: dict[str, Path]
    policy_fingerprint: str
    behavior_fingerprint: str


def check_models(config: RunConfig) -> Models:
    """Find all models and see that they fit each other and the run.

    Raises:
        InputError: A model is missing or unusable, their vocabularies differ, or the run wants
            longer sequences than the policy was made for.
        ConfigError: The backend or LoRA is not installed, the policy has no layers of the names in
            `sft.lora` or `rl.lora`, `score.top_k` is more than a behavior model's vocabulary, or
            a `tensor_parallel_size` does not divide the attention heads or the vocabulary of a
            model that the stage has engines on.
    """
    _check_installed(config)
    policy = _naming("models.policy", lambda: resolve_model(config.models.policy))
    behavior = _naming("models.behavior", lambda: resolve_behavior(config.models.behavior))
    for source, model in behavior.items():
        same = vocabulary_fingerprint(policy) == vocabulary_fingerprint(model)
        if not same and config.models.align == "refuse":
            raise InputError(
                f"models.policy={config.models.policy} and models.behavior={model} (source "
                f"{source!r}) have different vocabularies: log-probs of one's tokens mean nothing "
                "for the other's; choose a behavior model with the policy's tokenizer, or set "
                "models.align=bytes"
            )
        if config.score.top_k and config.score.top_k > vocab_size(model):
            raise ConfigError(
                f"score.top_k={config.score.top_k} is more than the {vocab_size(model)} ids of "
                f"models.behavior={model} (source {source!r}); lower it"
            )
    _check_split(config, {"models.policy": policy} | _named(behavior))
    for key, lora in _loras(config).items():
        # Torch and transformers take seconds: only a run with adapters pays for them.
        from pear_ray.engines.target_modules import check_target_modules  # noqa: PLC0415

        check_target_modules(policy, lora.named_targets, key=key)
    longest = max_positions(policy)
    if longest is not None and config.models.max_model_len > longest:
        raise InputError(
            f"models.max_model_len={config.models.max_model_len} is more than the {longest} "
            f"positions of models.policy={config.models.policy}; lower it"
        )
    identities = {source: model_fingerprint(model) for source, model in behavior.items()}
    return Models(policy, behavior, model_fingerprint(policy), json.dumps(identities))


def _check_installed(config: RunConfig) -> None:
    if config.sft.backend.kind == "deepspeed" and find_spec("deepspeed") is None:
        raise ConfigError(
            "sft.backend.kind=deepspeed wants DeepSpeed, which is not installed; "
            "pip install 'pear-ray[deepspeed]', or use kind fsdp"
        )
    for key in _loras(config):
        if find_spec("peft") is None:
            raise ConfigError(
                f"{key} wants peft, which is not installed; pip install 'pear-ray[lora]', or leave "
                "it out"
            )


def _loras(config: RunConfig) -> dict[str, LoraConfig]:
    """The sections of adapters that the run has, by key."""
    found = {"sft.lora": config.sft.lora, "rl.lora": config.rl.lora}
    return {key: lora for key, lora in found.items() if lora is not None}


def _named(behavior: dict[str, Path]) -> dict[str, Path]:
    return {f"models.behavior (source {source!r})": model for source, model in behavior.items()}


def _check_split(config: RunConfig, models: dict[str, Path]) -> None:
    """See that every model splits over the devices that its engines are asked to have."""
    behavior = [name for name in models if name != "models.policy"]
    asked = [
        *((name, "score") for name in models),
        *((name, "collect") for name in behavior),
        *(("models.policy", stage) for stage in ("rl", "evaluate")),
    ]
    for name, stage in asked:
        heads, devices = num_attention_heads(models[name]), engine_span(config, stage)
        if heads is not None and heads % devices:
            raise ConfigError(
                f"{SPAN_SETTINGS[stage]}={devices} does not divide the {heads} attention heads of "
                f"{name}: {models[name]}; use a divisor of {heads}"
            )
        if devices == 1:
            continue
        rows = math.ceil(vocab_size(models[name]) / PADDED_TO) * PADDED_TO
        if rows % devices:
            raise ConfigError(
                f"{SPAN_SETTINGS[stage]}={devices} does not divide the {rows} rows that vLLM makes "
                f"of the vocabulary of {name}: {models[name]}; use 2, 4 or 8"
            )


def check_corpus(config: RunConfig, models: Models) -> None:
    """Look at a corpus's files and first rows as the collect stage will.

    Raises:
        InputError: There is nothing to read, or too many rows cannot be used; the message lists
            reasons, and the first rows by file, number and field.
    """
    # Loading a tokenizer takes seconds: only a run that makes its corpus pays for it.
    from pear_ray.corpus.finish import preview  # noqa: PLC0415
    from pear_ray.corpus.prepare import prepare_job  # noqa: PLC0415

    if isinstance(config.corpus, DatasetCorpus):
        # A preview writes nothing.
        job = prepare_job(config, config.corpus, models.policy, models.behavior, folder=Path())
        preview(find_parts(config.corpus), job)


def check_source_weights(config: RunConfig, sources: Collection[str], *, of: str) -> None:
    """See that `sft.weights` of kind by_source names the sources of the corpus, all and no other.

    Args:
        config: The run.
        sources: Names of the corpus's sources.
        of: Where they were found, for the message.

    Raises:
        ConfigError: A source has no weight, or a weight no source.
    """
    weights = config.sft.weights
    if weights.kind != "by_source" or set(weights.weights) == set(sources):
        return
    unweighted = sorted(set(sources).difference(weights.weights))
    unknown = sorted(set(weights.weights).difference(sources))
    wrong = [f"no weight for {', '.join(unweighted)}"] if unweighted else []
    wrong += [f"no row of {', '.join(unknown)}"] if unknown else []
    raise ConfigError(
        f"sft.weights.weights names {', '.join(sorted(weights.weights))}, and the sources of {of} "
        f"are {', '.join(sorted(sources))}: {'; '.join(wrong)}; give each source of the corpus a "
        "weight, and no other"
    )


def check_collected_sources(config: RunConfig, folder: Path) -> None:
    """See the same of the complete `collect` artifact in `folder`.

    Raises:
        ConfigError: As in `check_source_weights`.
    """
    if config.sft.weights.kind == "by_source":
        sources = manifest.require_manifest(folder).details["sources"]
        read = config.corpus.path if isinstance(config.corpus, DatasetCorpus) else ""
        of = f"{read} ({folder / 'corpus'})" if read else f"{folder / 'corpus'}"
        check_source_weights(config, sources, of=of)


def check_problems(config: RunConfig, policy: Path, stages: Collection[str]) -> None:
    """Make every problem set that `stages` will use and see that prompts and completions fit.

    Raises:
        ConfigError: A game or parameter is unknown, or there are too few problems.
        ConfigError: A verifier cannot be loaded.
        InputError: A problem cannot be used or verified, or its prompt leaves no room for its
            completion.
    """
    # Loading a tokenizer takes seconds: only what will run pays for it.
    from pear_ray.engines.chat import ChatTokenizer  # noqa: PLC0415

    chat = ChatTokenizer(policy)
    for key, problems, max_tokens, rewards in _problem_sets(config, stages):
        _check_rewards(key, problems, rewards)
        prompts = [chat.prompt_ids(problem.question) for problem in problems]
        check_prompt_ids(prompts, policy, eos_token=chat.eos_id, pad_token=chat.pad_id)
        lengths = list(map(len, prompts))
        longest = max(range(len(lengths)), key=lengths.__getitem__)
        if lengths[longest] + max_tokens > config.models.max_model_len:
            raise InputError(
                f"{key}: problem {problems[longest].problem_id} has a prompt of {lengths[longest]} "
                f"tokens, and with {key.removesuffix('.problems')}.max_tokens={max_tokens} that "
                "is more than "
                f"models.max_model_len={config.models.max_model_len}; raise it (the model allows "
                f"{max_positions(policy)}), lower max_tokens, or make the problems easier"
            )


def check_rollouts(folder: Path, policy: Path, max_model_len: int) -> None:
    """See that saved rollouts are of the policy's tokenizer and chat template, and fit it.

    Raises:
        InputError: They are of others, or longer than `max_model_len`.
        ArtifactError: They cannot be read.
    """
    # Loading a tokenizer takes seconds: only what will run pays for it.
    from pear_ray.engines.chat import ChatTokenizer  # noqa: PLC0415

    file = next(iter(saved_steps(folder).values()))
    rollouts = [one for group in read_groups(file) for one in group.rollouts]
    first, chat = rollouts[0], ChatTokenizer(policy)
    if (prompt := chat.prompt_ids(first.problem.question)) != first.prompt_ids:
        raise InputError(
            f"{file}: problem {first.problem.problem_id} has a prompt of {len(first.prompt_ids)} "
            f"tokens there and of {len(prompt)} others in {policy}: the rollouts are of another "
            "tokenizer or chat template; give those of this policy"
        )
    longest = max(len(one.prompt_ids) + len(one.completion.token_ids) for one in rollouts)
    if longest > max_model_len:
        raise InputError(
            f"{file}: holds a rollout of {longest} tokens, more than models.max_model_len="
            f"{max_model_len}; raise it"
        )


def _check_rewards(key: str, problems: list[Problem], rewards: RewardConfig) -> None:
    """See that verifiers load, as they will in the stage, and have what they compare with."""
    _naming(key, lambda: check_verifiable(problems, rewards))
    kinds = {component.kind for component in rewards.components}
    if "math" in kinds:
        check_math_installed()
    if "function" in kinds:  # importing it here would run the user's module in this process
        with RewardPool(rewards.model_copy(update={"num_processes": 1})) as pool:
            _naming(f"{key.removesuffix('.problems')}.rewards", pool.wait_until_ready)


def _problem_sets(
    config: RunConfig, stages: Collection[str]
) -> Iterator[tuple[str, list[Problem], int, RewardConfig]]:
    corpus, rl, suites = config.corpus, config.rl, suites_of(config.evaluate)
    if "collect" in stages and isinstance(corpus, SampledCorpus):
        made = _naming("corpus.problems", lambda: make_problems(corpus.problems))
        yield "corpus.problems", made, corpus.max_tokens, corpus.rewards
    if {"ready", "rl", "rl_rollouts"}.intersection(stages):
        made = _naming("rl.problems", lambda: training_problems(rl))
        yield "rl.problems", made, rl.max_tokens, rl.rewards
    wanted = [each.pass_at_k for each in (rl, config.sft) if each.pass_at_k is not None]
    if "evaluate" not in stages:
        suites = suites[:1] if wanted else []  # what is asked while a stage trains
    sets = evaluation_problems(config, suites)
    for place, suite in enumerate(suites):
        key = f"{suite.key}.problems"
        made = _naming(key, lambda: next(sets))
        most = max((each.num_problems or 0 for each in wanted), default=0)
        if place == 0 and most > len(made):
            raise ConfigError(
                f"pass_at_k.num_problems={most} wants more than the {len(made)} problems of "
                f"{key}; lower it, or leave it out for all"
            )
        yield key, made, suite.max_tokens, suite.rewards


def _naming(key: str, resolve: Callable[[], T]) -> T:
    """`resolve()`, with `key` in front of what it refuses."""
    try:
        return resolve()
    except (ConfigError, InputError, RewardError) as error:
        raise type(error)(f"{key}: {error}") from error


def local_resources(device: str) -> dict[str, float]:
    """What a local Ray on this machine would have."""
    found = {"CPU": float(os.cpu_count() or 1)}
    if device == "cuda":
        found["GPU"] = float(len(list(Path("/dev").glob("nvidia[0-9]*"))))
    return found
