"""What SFT's weights made of each source of the corpus: figures over steps, and a table."""

import numpy as np

from pear_ray.reporting.load import RunData
from pear_ray.reporting.page import Table
from pear_ray.reporting.plot import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    Chart,
    Line,
    line_chart,
    plain_label,
)

PREFIX = "sft/source/"
_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, GREY)
_STEP = "SFT step"
_COLUMNS = {
    "num_tokens": "tokens",
    "token_share": "share of tokens",
    "weight_share": "share of weight",
    "weight/mean": "mean weight",
    "ess_fraction": "ESS fraction",
    "nll": "NLL",
    "log_ratio/mean": "mean log-ratio",
    "log_ratio_clip_low_fraction": "clipped low",
    "log_ratio_clip_high_fraction": "clipped high",
    "log_weight_floor_fraction": "at the floor",
}


def source_names(data: RunData) -> list[str]:
    """The sources that SFT logged apart, those with the most tokens over all steps first."""
    tokens: dict[str, float] = {}
    for record in data.metrics["sft"]:
        for name, value in record.metrics.items():
            if name.startswith(PREFIX) and name.endswith("/num_tokens"):
                source = name.removeprefix(PREFIX).removesuffix("/num_tokens")
                tokens[source] = tokens.get(source, 0.0) + value
    return sorted(tokens, key=lambda source: (-tokens[source], source))


def source_ess(data: RunData, sources: list[str]) -> Chart:
    """ESS fraction of each source's tokens, per SFT step."""
    lines = [
        Line(plain_label(source), *data.series("sft", f"{PREFIX}{source}/ess_fraction"), colour)
        for source, colour in zip(sources, _COLOURS, strict=False)
    ]
    return line_chart(
        lines,
        title="Effective sample size by source",
        caption="Share of a source's own tokens that the weights leave effective: a source far "
        f"below the others trains on few of its tokens.{_left_out(sources)}",
        x_label=_STEP,
        y_label="fraction of the source's tokens",
        from_zero=True,
    )


def source_weight_shares(data: RunData, sources: list[str]) -> Chart:
    """Share of the step's weight that each source has, beside its share of the tokens."""
    lines = []
    for source, colour in zip(sources, _COLOURS, strict=False):
        weight, tokens = (
            data.series("sft", f"{PREFIX}{source}/{name}")
            for name in ("weight_share", "token_share")
        )
        lines += [
            Line(plain_label(source), *weight, colour),
            Line("_tokens", *tokens, colour, ":"),  # an underscore keeps it out of the legend
        ]
    return line_chart(
        lines,
        title="Weight by source",
        caption="Solid: share of the step's weight; dotted, in the same colour: share of its "
        "tokens, which plain SFT would give it. A source that lies above its dots is one that the "
        f"policy finds plausible.{_left_out(sources)}",
        x_label=_STEP,
        y_label="share",
        from_zero=True,
    )


def source_table(data: RunData, sources: list[str]) -> Table:
    """Every source in the last step that had tokens of it."""
    rows = []
    for source in sources:
        of_source = [
            {name: record.metrics[f"{PREFIX}{source}/{name}"] for name in _COLUMNS}
            | {"step": record.step}
            for record in data.metrics["sft"]
            if record.metrics.get(f"{PREFIX}{source}/num_tokens")
        ]
        if of_source:
            last = of_source[-1]
            cells = [_cell(name, last[name]) for name in _COLUMNS]
            rows.append([source, f"{last['step']:,}", *cells])
    return Table(["source", "step", *_COLUMNS.values()], rows)


def _cell(name: str, value: float) -> str:
    if name == "num_tokens":
        return f"{value:,.0f}"
    if name.endswith(("_share", "_fraction")):
        return f"{100 * value:.1f} %"
    return f"{value:.3g}" if np.isfinite(value) else "not finite"


def _left_out(sources: list[str]) -> str:
    num_left_out = len(sources) - len(_COLOURS)
    if num_left_out <= 0:
        return ""
    return f" Drawn are the {len(_COLOURS)} largest sources; the table has {num_left_out} more."
