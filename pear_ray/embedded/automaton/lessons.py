"""What the student is trained on: endless plain solutions of random programs, with slips."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer

from pear_ray.embedded.automaton.game import (
    MAX_RECITAL,
    NUM_STEPS,
    OPERATIONS,
    OPERATIONS_OF,
    PERMUTATIONS,
    PLACES,
    RECITAL,
    STATES,
    others_than,
)
from pear_ray.embedded.automaton.teacher import ANSWER, ANSWER_ENDS
from pear_ray.embedded.tokenizer import ASSISTANT, END, USER

_IGNORED = -100  # what cross_entropy leaves out
_PROMPT_TOKENS = 3 + 3 + NUM_STEPS  # the template's, then game, recital's end, state, program
_TABLE = torch.tensor(
    [[STATES.index(state) for state in PERMUTATIONS[operation]] for operation in OPERATIONS]
)  # [operation, state]


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """One stretch of training.

    Attributes:
        name: For the log.
        num_steps: Optimizer steps.
        learning_rate: Peak.
        slip: Probability that a state is written wrong.
        shortness: How fast the likelihood of a recital falls with its length, as a power of it.
            Short ones teach the table of operations soonest; problems have the long ones.
        seed: Decides programs and slips.
        free: Share of rows whose recitals are of any letters, as of a teacher with `free` 1.
    """

    name: str
    num_steps: int
    learning_rate: float
    slip: float
    shortness: float
    seed: int
    free: float = 0.0


def batches(
    tokenizer: Tokenizer, phase: Phase, *, batch_size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids and labels, both [batch, seq]; labels are -100 on prompts.

    Rows of a batch recite alike, so that none is padded.
    """
    generator = torch.Generator().manual_seed(phase.seed)
    recitals = torch.arange(1, MAX_RECITAL + 1)
    while True:
        chosen = torch.multinomial(recitals**-phase.shortness, 1, generator=generator)
        token_ids = _rows(
            tokenizer,
            batch_size=batch_size,
            num_recited=int(recitals[chosen]),
            slip=phase.slip,
            free=phase.free,
            generator=generator,
        )
        labels = token_ids.clone()
        labels[:, :_PROMPT_TOKENS] = _IGNORED
        yield token_ids, labels


def _rows(
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    num_recited: int,
    slip: float,
    free: float,
    generator: torch.Generator,
) -> torch.Tensor:
    """Prompts with plain solutions, half of each game; [batch, seq]."""

    def ids(symbols: str | tuple[str, ...]) -> torch.Tensor:
        return torch.tensor([tokenizer.token_to_id(symbol) for symbol in symbols])

    def same(symbol: str) -> torch.Tensor:
        return ids((symbol,)).expand(batch_size)

    def drawn(below: int) -> torch.Tensor:
        return torch.randint(below, (batch_size,), generator=generator)

    recital = RECITAL[:num_recited]
    others = ids(others_than(recital[-1]))
    freely = torch.rand(batch_size, generator=generator) < free if free else None

    def recited() -> list[torch.Tensor]:
        letters = [same(letter) for letter in recital]
        if freely is not None:
            letters[:-1] = [
                torch.where(freely, others[drawn(len(others))], each) for each in letters[:-1]
            ]
        return letters

    state_ids, operation_ids = ids(STATES), ids(OPERATIONS)
    game = drawn(len(OPERATIONS_OF))
    known = torch.tensor([[OPERATIONS.index(o) for o in one] for one in OPERATIONS_OF.values()])
    operations = [known[game, drawn(known.shape[1])] for _ in PLACES]
    state = drawn(len(STATES))
    prompt = [same(USER), ids(tuple(OPERATIONS_OF))[game], same(recital[-1])]
    prompt.append(state_ids[state])
    completion = []
    for place, operation in zip(PLACES, operations, strict=True):
        prompt.append(ids(tuple(each + place for each in OPERATIONS))[operation])
        completion += [same(place), operation_ids[operation], state_ids[state]]
        slips = torch.rand(batch_size, generator=generator) < slip
        # By 1 to 15 places: a slip is never the right state.
        state = _TABLE[operation, state] + slips * (1 + drawn(len(STATES) - 1))
        state %= len(STATES)
        completion.append(state_ids[state])
        completion += recited()
    prompt += [same(END), same(ASSISTANT)]
    completion += [same(ANSWER), state_ids[state], same(ANSWER_ENDS), same(END)]
    return torch.stack(prompt + completion, dim=1)
