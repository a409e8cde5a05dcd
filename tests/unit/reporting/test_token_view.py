"""Every token is to be seen, and its colours and letters mean what the legend says."""

import math

import pytest

from pear_ray.config.sft import PearWeights
from pear_ray.reporting.token_view import (
    TokenRow,
    log_ratio_scale,
    logprob_scale,
    printable,
    render_legend,
    render_tokens,
    token_texts,
    visible,
)

LIGHT_RED, RED, LIGHT_BLUE, BLUE = "#f4a582", "#d6604d", "#92c5de", "#4393c3"


def byte_decode(ids):
    """As a byte-level tokenizer decodes: one id, one byte."""
    return bytes(ids).decode("utf-8", errors="replace")


def words_decode(ids):
    """As a tokenizer that drops the first token's leading space."""
    vocabulary = {0: " the", 1: " cat", 2: "s"}
    return "".join(vocabulary[one] for one in ids).removeprefix(" ")


def spans(text):
    return [
        (text.plain[span.start : span.end], str(span.style)) for span in text.spans if span.style
    ]


def test_plain_tokens_are_their_text():
    assert token_texts(list(b"a b\n"), byte_decode) == ["a", " ", "b", "\n"]
    assert token_texts([], byte_decode) == []


def test_a_leading_space_is_kept_inside_a_text():
    assert token_texts([0, 1, 2, 0], words_decode) == ["the", " cat", "s", " the"]


def test_a_character_split_over_tokens_shows_at_its_last():
    ids = [*"é".encode(), ord("x"), *"🍐".encode()]
    assert token_texts(ids, byte_decode) == ["◌", "é", "x", "◌", "◌", "◌", "🍐"]


def test_bytes_that_never_make_a_character_show_as_ids():
    assert token_texts([0xC3], byte_decode) == ["⟨195⟩"]
    assert token_texts([0xFF] * 8 + [ord("a")], byte_decode) == ["⟨255⟩"] * 8 + ["a"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" ", "·"),
        ("\n\n", "⏎\n⏎\n"),
        ("\ta\r", "⇥a␍"),
        ("", "∅"),
        ("\x1b[31m", r"\x1b[31m"),
        ("a\u202eb", r"a\u202eb"),
        ("\xa0", r"\xa0"),
        ("é🍐", "é🍐"),
    ],
)
def test_what_cannot_be_seen_is_made_visible(text, shown):
    assert visible(text) == shown


def test_printable_keeps_lines_and_spaces():
    assert printable("a b\nc\x07") == "a b\nc\\x07"


@pytest.mark.parametrize(
    ("value", "colour"),
    [
        (-1.5, RED),
        (-1.0, LIGHT_RED),
        (-0.081, LIGHT_RED),
        (-0.08, ""),
        (0.0, ""),
        (0.30, ""),
        (0.301, LIGHT_BLUE),
        (1.2, BLUE),
    ],
)
def test_log_ratio_colours_change_at_the_clip_bounds(value, colour):
    style = log_ratio_scale(PearWeights()).style(value)
    assert style == (f"black on {colour}" if colour else "")


def test_wide_clip_bounds_move_the_outer_colours():
    scale = log_ratio_scale(PearWeights(log_ratio_clip_low=-2.0, log_ratio_clip_high=3.0))
    assert scale.style(-7.9) == f"black on {LIGHT_RED}"
    assert scale.style(-8.1) == f"black on {RED}"
    assert scale.style(3.0) == ""
    assert scale.words[0] == "below -8"
    assert scale.words[4] == "above 12"


def test_a_value_that_is_no_number_stands_out():
    for value in (math.nan, math.inf):
        assert "white on" in logprob_scale("x").style(value)


def test_tokens_carry_colour_and_letters():
    row = TokenRow(
        "row",
        ["a", " ", "b", "c", "d"],
        [False, True, True, True, True],
        [math.nan, -2.0, 0.0, 0.5, 0.0],
        [0.0, 0.4, 1.3, 1.0, 1.25],
    )
    text = render_tokens(row, log_ratio_scale(PearWeights()))
    assert text.plain == "row\na·bcd"
    assert spans(text) == [
        ("row\n", "bold"),
        ("a", "dim"),
        ("·", f"black on {RED} underline"),
        ("b", "bold"),
        ("c", f"black on {LIGHT_BLUE}"),
    ]


def test_tokens_without_numbers_are_only_dimmed():
    text = render_tokens(TokenRow("row", ["a", "b"], [False, True]), None)
    assert spans(text) == [("row\n", "bold"), ("a", "dim")]


def test_text_is_never_markup():
    text = render_tokens(TokenRow("[red]r", ["[bold]", "x"], [True, True]), None)
    assert text.plain == "[red]r\n[bold]x"


def test_the_legend_names_what_is_drawn():
    full = render_legend(log_ratio_scale(PearWeights()), weighted=True, note="a\x1b").plain
    assert "-1 to -0.08 (clipped low)" in full
    assert "bold: above 1.25  underlined: below 0.5" in full
    assert full.endswith("\na\\x1b")
    bare = render_legend(None, weighted=False).plain
    assert bare == "dim: not trained  · space  ⏎ line end  ◌ part of a character"
