"""Figures that every stage that trains has alike."""

from pear_ray.reporting.load import RunData
from pear_ray.reporting.plot import GREEN, Chart, Line, Threshold, has_spikes, line_chart

STAGE_WORDS = {"sft": "SFT", "rl": "RL"}


def grad_norm(data: RunData, stage: str) -> Chart:
    """Gradient norm per step of `sft` or `rl`, with the clip."""
    words = STAGE_WORDS[stage]
    limit = None
    if data.config:
        section = {"sft": data.config.sft, "rl": data.config.rl}[stage]
        limit = section.optimizer.max_grad_norm
    steps, norms = data.series(stage, f"{stage}/grad_norm")
    return line_chart(
        [Line("gradient norm", steps, norms, GREEN)],
        title=f"{words} gradient norm",
        caption="Global gradient norm before clipping: steps above the dashed line were scaled "
        "down to it; spikes that recur ask for a smaller learning rate.",
        x_label=f"{words} step",
        y_label="norm",
        thresholds=[Threshold("max_grad_norm", limit)] if limit else [],
        log=has_spikes(norms),
    )
