"""A policy that does not end its completions is found at the first step, by the real engine."""

from typing import Any

import pytest

from pear_ray.errors import HandoverError


def test_a_policy_that_never_ends_is_refused_at_once(start_grpo: Any) -> None:
    worker = start_grpo(max_tokens=2)
    with pytest.raises(
        HandoverError, match=r"32 of 32 completions were cut at rl.max_tokens=2"
    ) as e:
        worker.step(0)
    assert "end at <|end|>, as the chat template's answers do: raise rl.max_tokens" in str(e.value)
    assert worker.trainer.step_count == 0


def test_it_is_told_what_its_template_lacks(start_grpo: Any) -> None:
    worker = start_grpo(max_tokens=2)
    worker.chat.tokenizer.chat_template = worker.chat.tokenizer.chat_template.replace("<|end|>", "")
    with pytest.raises(
        HandoverError, match=r"end at <\|end\|> alone, .* writes nothing behind an an"
    ):
        worker.step(0)


def test_a_limit_of_1_lets_it_train(start_grpo: Any) -> None:
    worker = start_grpo(max_tokens=2, overlong={"max_truncated_fraction": 1.0})
    assert worker.step(0)["rl/truncated_fraction"] == 1.0
    assert start_grpo(max_tokens=2).step(1)["rl/truncated_fraction"] == 1.0  # no longer the first
