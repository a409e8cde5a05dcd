"""How far a checkpoint has moved from its base, on the real engine."""

from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import run_config

from pear_ray.config.run import validate_run
from pear_ray.embedded.paths import embedded_path
from pear_ray.engines.hf_scorer import reference_logprobs


def test_drift_is_the_log_ratio_of_checkpoint_and_base(
    grpo: Any, engine: Any, tmp_path: Path
) -> None:
    from pear_ray.distributed.ready_loop import drift
    from pear_ray.distributed.train_worker import export

    tree = run_config(tmp_path).model_dump(mode="json") | {"ready": {"drift_completions": 3}}
    config, base = validate_run(tree, origin="test"), embedded_path("student")
    groups = grpo.rollouts.reward(grpo.rollouts.sample(0), policy_version=0)
    same = drift(engine, groups, base, config=config)
    assert [row["group"] for row in same] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert max(abs(row["log_ratio"]) / row["tokens"] for row in same) < 1e-5

    grpo.trainer.module.reshard()  # the root stays gathered after a forward pass
    with torch.no_grad():
        for parameter in grpo.trainer.module.parameters():
            parameter.mul_(1.03)
    grpo.publish_weights()
    groups = grpo.rollouts.reward(grpo.rollouts.sample(0), policy_version=0)
    export(grpo.trainer, grpo.chat, tmp_path / "moved")
    found = drift(engine, groups, base, config=config)
    first = groups[0].rollouts[0]
    ids, begin = [*first.prompt_ids, *first.completion.token_ids], len(first.prompt_ids)
    mine, theirs = (
        sum(reference_logprobs(folder, [ids])[0][begin:]) for folder in (tmp_path / "moved", base)
    )
    assert found[0]["tokens"] == len(first.completion.token_ids)
    assert found[0]["log_ratio"] == pytest.approx(mine - theirs, abs=1e-3)
    assert sum(row["kl_k3"] for row in found) > 0.01
