"""Which setting, at which value, makes a phase fit: looked for by planning again with it."""

import functools
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pear_ray.config.run import RunConfig, validate_run
from pear_ray.config.spans import SPAN_SETTINGS, engine_span
from pear_ray.errors import ConfigError
from pear_ray.memory.items import Phase, Verdict

TOKENS_STEP = 64  # values of token counts are rounded down to it: nobody wants 3,917
FRACTION_STEP = 0.05
SPANS = (2, 4, 8)  # devices of one engine, on nodes of up to eight
# Where what there is is not known, all that can be mended is an engine that lacks something.
FITTING = {Verdict.FITS, Verdict.TIGHT, Verdict.UNKNOWN}
Plan = Callable[[RunConfig], Sequence[Phase]]


@dataclass(frozen=True, slots=True)
class Mend:
    """Settings with which a phase fits, and what it then takes."""

    settings: Mapping[str, Any]
    num_bytes: int
    available_bytes: int | None

    @property
    def words(self) -> str:
        """`rl.activation_checkpointing=true rl.colocation.offload=all`: overrides that say so."""
        return " ".join(f"{key}={_spelt(value)}" for key, value in self.settings.items())


@dataclass(frozen=True, slots=True)
class Knob:
    """A setting, and the values worth trying: those nearest to the present one first."""

    setting: str
    values: Sequence[Any]


def find_mends(config: RunConfig, name: str, plan: Plan) -> list[Mend]:
    """Every single setting that makes the phase `name` fit, else several that do it together.

    With what measured peaks were above a plan left over, where that can be had.

    Args:
        config: The run, whose phase does not fit.
        name: The phase's name.
        plan: Plans a changed run in the same circumstances.

    Returns:
        One mend per setting; or one that joins several; or none, where all that can be set does not
        do.
    """

    @functools.cache  # the same value is looked at for its verdict and for what it leaves missing
    def phase_with(settings: tuple[tuple[str, Any], ...]) -> Phase | None:
        changed = with_settings(config, dict(settings))
        if changed is None:
            return None
        return next(phase for phase in plan(changed) if phase.name == name)

    def planned(settings: Mapping[str, Any]) -> Phase | None:
        return phase_with(tuple(settings.items()))

    knobs = list(_knobs(config, name))
    for verdicts in ({Verdict.FITS}, FITTING):
        single = [_first_fit(knob, {}, planned, verdicts) for knob in knobs]
        if any(single):
            return [mend for mend in single if mend]
    joined: dict[str, Any] = {}
    for knob in knobs:
        mend = _first_fit(knob, joined, planned, FITTING)
        if mend:
            return [mend]
        least = _least(knob, joined, planned)
        if least is not None:
            joined[knob.setting] = least
    return []


def _spelt(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def with_settings(config: RunConfig, settings: Mapping[str, Any]) -> RunConfig | None:
    """The run with other values of dotted keys; None where they do not go together."""
    tree = json.loads(config.model_dump_json())
    for setting, value in settings.items():
        *parents, leaf = setting.split(".")
        node = tree
        for parent in parents:
            node = node[parent]
        node[leaf] = value
    try:
        return validate_run(tree, origin="plan")
    except ConfigError:
        return None


def _first_fit(
    knob: Knob,
    joined: Mapping[str, Any],
    planned: Callable[[Mapping[str, Any]], Phase | None],
    verdicts: Collection[Verdict],
) -> Mend | None:
    """The mend with the value of `knob` that changes the run least and ends in `verdicts`."""

    def mend_with(value: Any) -> Mend | None:
        settings = {**joined, knob.setting: value}
        phase = planned(settings)
        if phase is None or phase.verdict not in verdicts:
            return None
        return Mend(settings, phase.peak.num_bytes, phase.available_bytes)

    return next((mend for value in knob.values if (mend := mend_with(value))), None)


def _least(
    knob: Knob, joined: Mapping[str, Any], planned: Callable[[Mapping[str, Any]], Phase | None]
) -> Any:
    """The value of `knob` that leaves least missing; None where none is better than the present."""

    def missing(settings: Mapping[str, Any]) -> float:
        phase = planned(settings)
        if phase is None or phase.available_bytes is None:
            return float("inf")
        return phase.peak.num_bytes - phase.available_bytes

    best = min(
        knob.values, key=lambda value: missing({**joined, knob.setting: value}), default=None
    )
    if best is None or missing({**joined, knob.setting: best}) >= missing(joined):
        return None
    return best


def _knobs(config: RunConfig, name: str) -> Iterator[Knob]:
    """What can be set about a phase, that which changes results least first."""
    cluster = config.cluster
    if name == "score":
        yield _fewer_tokens("score.chunk_tokens", config.score.chunk_tokens, least=TOKENS_STEP)
    if name in ("sft", "rl"):
        stage = config.sft if name == "sft" else config.rl
        if not stage.activation_checkpointing:
            yield Knob(f"{name}.activation_checkpointing", [True])
        # No fewer than the longest row: it could not be trained on.
        least = config.models.max_model_len
        yield _fewer_tokens(f"{name}.microbatch_tokens", stage.microbatch_tokens, least=least)
    if cluster.device == "cuda":
        yield from _gpu_knobs(config, name)
    evaluates = config.sft.pass_at_k is not None
    if name == "sft" and evaluates:
        yield Knob("sft.pass_at_k", [None])
    if name != "sft" or evaluates:
        yield (
            Knob("cluster.kv_cache_gib", _kv_caches(cluster.kv_cache_gib))
            if cluster.device == "cpu"
            else Knob("cluster.gpu_memory_fraction", _fractions(cluster.gpu_memory_fraction))
        )
    if name in ("sft", "rl"):
        yield Knob("cluster.num_trainers", _trainers(config))
    else:
        yield Knob("cluster.num_samplers", range(cluster.num_samplers - 1, 0, -1))


def _gpu_knobs(config: RunConfig, name: str) -> Iterator[Knob]:
    """More devices for an engine, and the host's memory for a trainer."""
    if name in SPAN_SETTINGS:
        wider = [size for size in SPANS if size > engine_span(config, name)]
        yield Knob(SPAN_SETTINGS[name], wider)
    if name == "rl":
        levels = ["none", "optimizer", "all"]
        more = levels[levels.index(config.rl.colocation.offload) + 1 :]
        yield Knob("rl.colocation.offload", more)
    if name == "sft" and config.sft.backend.kind == "fsdp" and not config.sft.backend.cpu_offload:
        yield Knob("sft.backend.cpu_offload", [True])


def _fewer_tokens(setting: str, present: int, *, least: int) -> Knob:
    """Values down to `least`, each a fiftieth smaller, in multiples of `TOKENS_STEP`."""
    values = []
    value = present
    while value > least:
        smaller = min(value - 1, value * 49 // 50) // TOKENS_STEP * TOKENS_STEP
        value = max(least, smaller)
        values.append(value)
    return Knob(setting, values)


def _kv_caches(present: int) -> list[int]:
    """Fewer GiB, then more: too small a cache is as much of a fault as too large a one."""
    return [*range(present - 1, 0, -1), *range(present + 1, 4 * present + 64)]


def _fractions(present: float) -> list[float]:
    steps = [round(FRACTION_STEP * step, 2) for step in range(1, round(1 / FRACTION_STEP))]
    return sorted((s for s in steps if s != present), key=lambda step: abs(step - present))


def _trainers(config: RunConfig) -> list[int]:
    """Numbers of trainers that prompts and sequences of a step split over."""
    present = config.cluster.num_trainers
    both = math.gcd(config.rl.prompts_per_step, config.sft.global_batch_size)
    # On this machine's CPUs more workers only make the shares smaller.
    is_here = config.cluster.device == "cpu" and config.cluster.address is None
    most = present - 1 if is_here else both
    divisors = [number for number in range(1, most + 1) if both % number == 0 and number != present]
    return sorted(divisors, key=lambda number: abs(number - present))
