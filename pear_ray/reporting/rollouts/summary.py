"""What `pear rl --rollouts-only` ends with."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pear_ray.artifacts.manifest import require_manifest
from pear_ray.records import RewardStatus
from pear_ray.reporting.rollouts.facts import all_lengths, step_facts

_COMPONENT = "reward/"
_LONG = 95  # the percentile that says where a token limit would begin to cut


def summarise(files: Sequence[Path], *, tokens_per_s: float) -> dict[str, float]:
    """What the rollouts of `files`, one for each step, sum up to.

    Pass rate, rewards and their components are means over the judged completions; fractions are of
    all completions or groups.
    """
    facts = [step_facts(file) for file in files]
    lengths = all_lengths(facts)
    num_judged = sum(each.num_judged for each in facts)
    judged, rollouts = max(1, num_judged), len(lengths)
    components: dict[str, float] = {}
    for each in facts:
        for name, value in each.component_sums.items():
            components[_COMPONENT + name] = components.get(_COMPONENT + name, 0.0) + value / judged
    num_groups = sum(each.num_groups for each in facts)
    return {
        "steps": len(facts),
        "groups": num_groups,
        "rollouts": rollouts,
        "judged": num_judged,
        "tokens": int(lengths.sum()),
        "pass_rate": sum(each.statuses[RewardStatus.OK] for each in facts) / judged,
        "reward_mean": sum(each.reward_sum for each in facts) / judged,
        **components,
        "errored_fraction": 1 - num_judged / rollouts,
        "degenerate_group_fraction": sum(each.num_degenerate for each in facts) / num_groups,
        "length_mean": float(lengths.mean()),
        "length_median": float(np.median(lengths)),
        f"length_p{_LONG}": float(np.percentile(lengths, _LONG)),
        "length_max": int(lengths.max()),
        "truncated_fraction": sum(each.num_truncated for each in facts) / rollouts,
        "tokens_per_s": tokens_per_s,
    }


def summary_text(stage_dir: Path) -> str:
    """The summary in the artifact's manifest, in lines for a terminal.

    Raises:
        ArtifactError: The artifact is not complete.
    """
    found: dict[str, Any] = require_manifest(stage_dir).details["summary"]
    components = [
        f"{name.removeprefix(_COMPONENT)} {value:.3f}"
        for name, value in found.items()
        if name.startswith(_COMPONENT)
    ]
    lines = {
        "rollouts": f"{found['rollouts']:,} in {found['groups']:,} groups of {found['steps']:,} "
        "steps",
        "pass rate": f"{found['pass_rate']:.3f} of {found['judged']:,} judged",
        "reward": f"mean {found['reward_mean']:.3f} ({', '.join(components)})",
        "reward errors": f"{100 * found['errored_fraction']:.2f} %",
        "equal groups": f"{100 * found['degenerate_group_fraction']:.1f} % teach nothing: all "
        "their outcomes agree",
        "length": f"mean {found['length_mean']:.1f}, median {found['length_median']:g}, "
        f"p{_LONG} {found[f'length_p{_LONG}']:g}, longest {found['length_max']:,} tokens",
        "truncated": f"{100 * found['truncated_fraction']:.1f} %",
        "speed": f"{found['tokens_per_s']:,.0f} tokens/s (median step)",
    }
    return "".join(f"{name:<14} {words}\n" for name, words in lines.items())
