"""Before the first step of RL: with nothing trained yet, sampler and trainer must say the same."""

import copy
import math
from typing import TYPE_CHECKING

import torch

from pear_ray.algorithms import weight_health
from pear_ray.algorithms.mismatch import finalise_mismatch
from pear_ray.config.rl_losses import OverlongConfig
from pear_ray.config.sections import compute_dtype
from pear_ray.distributed.rl_rollouts import Sampled
from pear_ray.distributed.rl_terms import denominator_of, microbatch_terms
from pear_ray.distributed.train_worker import Laps
from pear_ray.engines.trainer import gather_over_ranks
from pear_ray.errors import TrainingError
from pear_ray.records import Reward, RewardStatus, Rollout, RolloutGroup

if TYPE_CHECKING:
    from pear_ray.distributed.rl_loop import GrpoWorker

PROMPTS_PER_RANK = 2
COMPLETIONS = 2
MAX_TOKENS = 32
# Two forward passes of the same weights, by what the trainer computes in. On a CPU they are equal
# to the bit; atomic sums on a GPU need not be.
MAX_LOG_RATIO = {"float32": 1e-5, "bfloat16": 1e-2}
# Mean over sampled tokens, by what the engine computes in. In float32 the two agree to 1e-6, in
# bfloat16 to 0.01 or so; `rl.mismatch_alert` warns long before this.
MAX_GAP = {"float32": 1e-3, "bfloat16": 0.1}


def check_start(worker: "GrpoWorker", *, dtype: str) -> dict[str, float]:
    """Sample a few completions and compute their loss, without a step (a collective).

    The canary after a weight sync compares given ids at temperature 1. This compares what the
    sampler says of its own samples, at the run's temperature, with what the trainer trains on.

    Args:
        worker: Trainer and engine with the same weights; left as they are.
        dtype: As `models.dtype`.

    Returns:
        `rl/self_test/max_log_ratio`, `rl/self_test/mean_gap`, `rl/self_test/grad_norm` and
        `time/self_test_s`.

    Raises:
        TrainingError: Two passes of the trainer differ, sampler and trainer do, or the gradient is
            not finite; on all ranks alike.
    """
    laps = Laps()
    small = _small(worker)
    sums: dict[str, float] = {}
    groups = [_group(one) for one in small.rollouts.sample(0)]
    worker.shared.to_trainer()
    for each in small.minibatches(groups)[0]:
        batch = each.batch
        with torch.no_grad():
            proximal = worker.trainer.policy(batch, temperature=small.config.temperature)
        batch.aligned["proximal_logprobs"] = proximal
        found = worker.trainer.policy(
            batch,
            temperature=small.config.temperature,
            exact_entropy=small.config.entropy_coefficient > 0,
        )
        outputs = found if isinstance(found, dict) else {"logprobs": found}
        terms = microbatch_terms(outputs, batch, small.config)
        worker.trainer.backward(terms.numerator)
        log_ratios = (outputs["logprobs"].detach() - proximal).abs()
        # Summed as well, because a maximum passes over NaN.
        extra = {"log_ratio": float(log_ratios.double().sum())}
        if len(log_ratios):
            extra["max/log_ratio"] = float(log_ratios.max())
        sums = weight_health.merge(sums, terms.sums | extra)
    together: dict[str, float] = {}
    for each in gather_over_ranks(sums):
        together = weight_health.merge(together, each)
    metrics = {
        "rl/self_test/max_log_ratio": together["max/log_ratio"] + 0.0 * together["log_ratio"],
        "rl/self_test/mean_gap": finalise_mismatch(together)["abs_gap/mean"],
        "rl/self_test/grad_norm": _grad_norm(worker, denominator_of(together, small.config)),
    }
    if worker.shared.takes_turns:
        worker.publish_weights()  # a sleeping engine has kept none
    laps.lap("self_test")
    where = f"before step {worker.trainer.step_count + 1}"
    trained_in = compute_dtype(dtype, device=worker.device.type)
    check_self_test(metrics, where=where, dtype=dtype, trained_in=trained_in)
    return metrics | {"time/self_test_s": laps.seconds["self_test"]}


def check_self_test(metrics: dict[str, float], *, where: str, dtype: str, trained_in: str) -> None:
    """See that the self-test found nothing.

    Raises:
        TrainingError: It did; all that differs is named.
    """
    log_ratio, gap = metrics["rl/self_test/max_log_ratio"], metrics["rl/self_test/mean_gap"]
    wrong = []
    if not log_ratio <= MAX_LOG_RATIO[trained_in]:
        wrong.append(
            f"two forward passes of the trainer differ by {log_ratio:.3g} nats (at most "
            f"{MAX_LOG_RATIO[trained_in]:g} in {trained_in}), so that its ratios are noise: look "
            "for dropout in the model's config, or for weights that are not finite"
        )
    if not gap <= MAX_GAP[dtype]:
        wrong.append(
            f"the sampler's log-probs of its own completions differ from the trainer's by {gap:.3g}"
            f" nats per token (at most {MAX_GAP[dtype]:g} in {dtype}), with the same weights: look "
            "for sampling options that only one of them knows (temperature, a soft cap, a logits "
            "bias in generation_config.json), or set models.dtype=float32"
        )
    if not math.isfinite(metrics["rl/self_test/grad_norm"]):
        wrong.append(
            f"the gradient norm is {metrics['rl/self_test/grad_norm']}: look for weights that are "
            "not finite in rl's starting model, or extreme log-probs"
        )
    if wrong:
        raise TrainingError(
            f"self-test {where}, with nothing trained in between: {'; and '.join(wrong)}"
        )


def _small(worker: "GrpoWorker") -> "GrpoWorker":
    """The same worker, with a config of a few short completions and one update."""
    small, rollouts = copy.copy(worker), copy.copy(worker.rollouts)
    small.config = rollouts.config = worker.config.model_copy(
        update={
            "prompts_per_step": PROMPTS_PER_RANK * worker.world_size,
            "group_size": COMPLETIONS,
            "max_tokens": min(MAX_TOKENS, worker.config.max_tokens),
            "updates_per_batch": 1,
            "overlong": OverlongConfig(),  # all of these short ones may be cut off
        }
    )
    small.rollouts = rollouts
    return small


def _group(sampled: Sampled) -> RolloutGroup:
    """The completions with rewards 0 and 1 in turn, so that there is a gradient whatever they say.

    Nothing is learnt from it.
    """
    return RolloutGroup(
        [
            Rollout(
                problem=sampled.problem,
                prompt_ids=sampled.prompt_ids,
                completion=completion,
                policy_version=0,
                reward=Reward(RewardStatus.OK, float(number % 2)),
            )
            for number, completion in enumerate(sampled.completions)
        ]
    )


def _grad_norm(worker: "GrpoWorker", denominator: float) -> float:
    """Of what has been accumulated, which is dropped; NaN or infinite where it is."""
    try:
        return worker.trainer.probe(denominator)
    except TrainingError:
        return math.nan
