"""Rows with log-probs of both policies, and the worked examples among them."""

import numpy as np

from pear_ray.reporting.diagnosis.rows import ScoredRow

# Eleven positions: prompt and pads hold garbage on purpose.
WORKED_MASK = [0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0]
WORKED_POLICY = [-3.0, -0.7, -1.2, -0.10, -0.50, -2.00, -0.05, -0.30, -0.02, -9, -9]
WORKED_BEHAVIOR = [-0.1, -4.0, -0.2, -0.15, -0.20, -2.90, -0.05, -0.28, -0.12, -0.5, -0.5]


def scored_row(policy, behavior, *, mask=None, source="teacher", example_id="e", **changes):
    mask = [1] * len(policy) if mask is None else mask
    return ScoredRow(
        example_id=example_id,
        source=source,
        token_ids=np.arange(len(policy), dtype=np.int32),
        loss_mask=np.array(mask, dtype=bool),
        behavior_logprobs=np.array(behavior, dtype=np.float32),
        policy_logprobs=np.array(policy, dtype=np.float32),
        **changes,
    )


def worked(**changes):
    return scored_row(WORKED_POLICY, WORKED_BEHAVIOR, mask=WORKED_MASK, **changes)


def second(**changes):
    return scored_row([-1.0, -0.4], [-0.2, -0.6], **changes)


def constant(log_ratio, *, length, **changes):
    """A row whose every log-ratio is the same; binary fractions, so that they are so exactly."""
    return scored_row([log_ratio - 2.0] * length, [-2.0] * length, **changes)
