"""Whether a policy ends its completions at all, seen before a step is spent on them."""

from collections.abc import Sequence

from pear_ray.distributed.rl_rollouts import RolloutMaker, Sampled
from pear_ray.engines.handover.files import Check
from pear_ray.engines.trainer import gather_over_ranks
from pear_ray.errors import HandoverError
from pear_ray.records import FinishReason

SHOWN_CHARACTERS = 60  # of a completion, in an error


def check_endings(maker: RolloutMaker, sampled: Sequence[Sampled]) -> None:
    """Refuse a policy whose completions are nearly all cut (a collective).

    Raises:
        HandoverError: Over all ranks more than `rl.overlong.max_truncated_fraction` were.
    """
    mine = [one for each in sampled for one in each.completions]
    cut = [one for one in mine if one.finish_reason is FinishReason.LENGTH]
    gathered = gather_over_ranks({"all": len(mine), "cut": len(cut)})
    total, num_cut = (sum(each[name] for each in gathered) for name in ("all", "cut"))
    limit = maker.config.overlong.max_truncated_fraction
    if num_cut <= limit * total:
        return
    shown = cut[0].text[-SHOWN_CHARACTERS:] if cut else "(on another rank)"
    why = explain_endings(maker.engine.end_tokens(), maker.chat.answer_ending())
    raise HandoverError(
        f"hand-over: {Check.ENDINGS}: step 1: {num_cut:g} of {total:g} completions were cut at "
        f"rl.max_tokens={maker.config.max_tokens} (rl.overlong.max_truncated_fraction={limit:g}). "
        f"{why}. The first that was cut ends with {shown!r}"
    )


def explain_endings(end_tokens: Sequence[str], template_ending: str) -> str:
    """Why completions may not end, and what to do, in words.

    Args:
        end_tokens: At which the engine ends a completion.
        template_ending: What the chat template writes behind an answer.
    """
    tokens = " or ".join(end_tokens)
    if any(token in template_ending for token in end_tokens):
        return (
            f"They would end at {tokens}, as the chat template's answers do: raise rl.max_tokens, "
            "or train SFT on answers that end (longer, or until they do)"
        )
    written = repr(template_ending) if template_ending else "nothing"
    return (
        f"They would end at {tokens} alone, and the chat template writes {written} behind an "
        "answer: SFT teaches no end. Set eos_token in the policy's tokenizer_config.json (or "
        "eos_token_id in its generation_config.json) to the template's end token, or mend the "
        "template, and train SFT again"
    )
