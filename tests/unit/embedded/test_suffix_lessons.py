"""The lessons that the student of the suffix game learns from."""

import pytest

from pear_ray.embedded.automaton.game import RECITAL
from pear_ray.embedded.automaton.lessons import batches
from pear_ray.embedded.automaton.tokenizer import build_tokenizer
from pear_ray.embedded.automaton.train import PHASES, phases_of


def recitals(free: float) -> list[tuple[str, str]]:
    """What a batch of rows recites in its first and its last step."""
    tokenizer = build_tokenizer()
    phase = phases_of(free=free, shortness=0.0)[1]
    token_ids, labels = next(batches(tokenizer, phase, batch_size=200))
    assert bool((labels[:, :13] == -100).all())
    found = []
    for row in token_ids.tolist():
        symbols = [tokenizer.id_to_token(each) for each in row]
        width = (len(symbols) - 13 - 4) // 7
        steps = [symbols[13 + width * step :][:width] for step in range(7)]
        assert symbols[2] == steps[0][-1] == steps[6][-1]  # what the prompt says it ends with
        found.append(("".join(steps[0][4:]), "".join(steps[6][4:])))
    return found


def test_plain_lessons_recite_the_alphabet() -> None:
    found = recitals(0.0)
    assert {first for first, _ in found} == {last for _, last in found}
    assert RECITAL.startswith(found[0][0])


@pytest.mark.parametrize("free", [0.5, 1.0])
def test_free_lessons_recite_any_letters(free: float) -> None:
    """A row is free from its first step to its last; half of 200 within 4 standard errors."""
    found = recitals(free)
    end = found[0][0][-1]
    assert all(end not in first[:-1] + last[:-1] for first, last in found)
    is_free = [
        (first != RECITAL[: len(first)], last != RECITAL[: len(last)]) for first, last in found
    ]
    assert all(first == last for first, last in is_free)
    assert sum(first for first, _ in is_free) == pytest.approx(200 * free, abs=4 * 50**0.5)


def test_the_table_of_operations_is_learnt_from_short_ones_in_any_case() -> None:
    assert phases_of(free=0.0, shortness=None) == PHASES
    assert phases_of(free=0.5, shortness=0.0)[0] == PHASES[0]
