"""The per-token loss that the weights multiply: plain SFT, and what the field has tried instead."""

from typing import Annotated, Literal

from pydantic import Field

from pear_ray.config.base import Section, by_kind


class Nll(Section):
    """`-log p`: plain SFT."""

    kind: Literal["nll"] = "nll"


class Dft(Section):
    """`sg[p] * -log p` (DFT, arXiv 2508.05629)."""

    kind: Literal["dft"] = "dft"


class PFamily(Section):
    """`(1 - p^a) / a` (arXiv 2510.00526)."""

    kind: Literal["p_family"] = "p_family"
    power: Annotated[float, Field(ge=0)] = 1.0
    """`a`: 0 is plain SFT, 1 has DFT's gradient."""


class IwSft(Section):
    """A ratio to the initial model as one more weight (iw-SFT, arXiv 2507.12856)."""

    kind: Literal["iw_sft"] = "iw_sft"
    level: Literal["sequence", "token"] = "sequence"
    """One weight per sequence, the geometric mean of its ratios, or each token's own ratio."""
    weight_cap: Annotated[float, Field(gt=0)] = 16.0
    """Largest weight of a sequence."""
    ratio_clip_low: Annotated[float, Field(ge=0)] = 0.2
    """Lower bound of a token's ratio."""
    ratio_clip_high: Annotated[float, Field(gt=0)] = 1.8
    """Upper bound of a token's ratio."""


class Talr(Section):
    """`sg[max(p^(1/tau), w_min)] * -log p`, tau the batch's median loss (TALR, arXiv 2509.20758).

    A step takes one forward pass more, for tau.
    """

    kind: Literal["talr"] = "talr"
    min_weight: Annotated[float, Field(ge=0, le=1)] = 0.01
    """`w_min`; its value in the paper is not known to us."""


class Psft(Section):
    """PPO's surrogate, every advantage 1, against the initial model (PSFT, arXiv 2508.17784)."""

    kind: Literal["psft"] = "psft"
    clip_low: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Distance below 1; it never binds, the smaller of both terms is taken."""
    clip_high: Annotated[float, Field(ge=0)] = 0.28
    """Distance above 1 at which a token stops training."""


class Eaft(Section):
    """`sg[(H / ln k)^a] * -log p`, H over the `k` likeliest ids (EAFT, arXiv 2601.02151)."""

    kind: Literal["eaft"] = "eaft"
    k: Annotated[int, Field(ge=2)] = 20
    """Ids that the entropy is over, renormalised."""
    power: Annotated[float, Field(ge=0)] = 1.0
    """`a`; 0 is plain SFT."""


class Asft(Section):
    """DFT with a KL penalty to the initial model (ASFT, arXiv 2509.23753)."""

    kind: Literal["asft"] = "asft"
    kl_coefficient: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the penalty."""
    reference_top_k: Annotated[int, Field(gt=0, le=1000)] = 64
    """Likeliest ids of the initial model that the KL tells apart; all others count as one."""


class SftKl(Section):
    """Plain SFT with a KL penalty to the initial model."""

    kind: Literal["sft_kl"] = "sft_kl"
    kl_coefficient: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the penalty."""
    reference_top_k: Annotated[int, Field(gt=0, le=1000)] = 64
    """Likeliest ids of the initial model that the KL tells apart; all others count as one."""


KlRest = Literal["tail", "renormalised"]


class ForwardKl(Section):
    """KL(behavior || policy) over the candidates that `score.top_k` kept: distillation."""

    kind: Literal["forward_kl"] = "forward_kl"
    rest: KlRest = "tail"
    """What becomes of the ids that were not kept: all others as one id, or left out with both sides
    divided by what is kept."""


ObjectiveConfig = Annotated[
    Annotated[
        Nll | Dft | PFamily | IwSft | Talr | Psft | Eaft | Asft | SftKl | ForwardKl,
        Field(discriminator="kind"),
    ],
    by_kind("nll"),
]


def reference_top_k(objective: ObjectiveConfig) -> int:
    """Candidates of the initial policy to keep for each loss token."""
    return objective.reference_top_k if isinstance(objective, Asft | SftKl) else 0
