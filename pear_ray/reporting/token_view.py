"""Token ids as people read them: every token visible, coloured by a log-prob or log-ratio."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.text import Text

from pear_ray.config.sft import PearWeights

HEAVY_WEIGHT, LIGHT_WEIGHT = 1.25, 0.5  # well above, and half of, what plain SFT gives a token
_VISIBLE = {" ": "·", "\n": "⏎\n", "\t": "⇥", "\r": "␍"}  # the line still breaks after a newline
_UNDECODED = "\N{REPLACEMENT CHARACTER}"
_MAX_PIECES = 8  # tokens that one character may be split into: four bytes, and then some
_FAR_CLIPS = 4.0  # times the clip bound, but at least
_FAR_NATS = 1.0  # a factor of e
_RED, _LIGHT_RED, _PALE_RED = "#d6604d", "#f4a582", "#fddbc7"
_LIGHT_BLUE, _BLUE = "#92c5de", "#4393c3"  # red and blue: told apart by nearly all eyes
_BROKEN = "bold white on #b3261e"


@dataclass(frozen=True, slots=True)
class Scale:
    """Which colour a value has: `styles[k]` from `edges[k - 1]` up to `edges[k]`."""

    name: str
    edges: tuple[float, ...]
    styles: tuple[str, ...]
    words: tuple[str, ...]

    def style(self, value: float) -> str:
        """The style of a value; one that is not finite cannot be overlooked."""
        if not math.isfinite(value):
            return _BROKEN
        return self.styles[sum(value >= edge for edge in self.edges)]


@dataclass(frozen=True, slots=True)
class TokenRow:
    """One row of a table as it is shown.

    Attributes:
        heading: What it is.
        texts: What each token stands for, [token].
        loss_mask: True where a token trains, [token]; the others are dimmed.
        values: What colours each token, [token]; read only where `loss_mask` is True.
        weights: PEAR weights, [token], likewise.
    """

    heading: str
    texts: Sequence[str]
    loss_mask: Sequence[bool]
    values: Sequence[float] | None = None
    weights: Sequence[float] | None = None


def logprob_scale(name: str) -> Scale:
    """Colours for log-probs: the less likely, the redder."""
    return Scale(
        name,
        (-3.0, -1.0, -0.2),
        (_on(_RED), _on(_LIGHT_RED), _on(_PALE_RED), ""),
        ("below -3", "-3 to -1", "-1 to -0.2", "above -0.2 (plain)"),
    )


def log_ratio_scale(weights: PearWeights) -> Scale:
    """Colours for log-ratios: red where the policy finds a token less likely than its author."""
    low, high = weights.log_ratio_clip_low, weights.log_ratio_clip_high
    far_low, far_high = min(-_FAR_NATS, _FAR_CLIPS * low), max(_FAR_NATS, _FAR_CLIPS * high)
    return Scale(
        "log-ratio, policy minus behavior",
        (far_low, low, math.nextafter(high, math.inf), far_high),
        (_on(_RED), _on(_LIGHT_RED), "", _on(_LIGHT_BLUE), _on(_BLUE)),
        (
            f"below {far_low:g}",
            f"{far_low:g} to {low:g} (clipped low)",
            "between the clip bounds (plain)",
            f"{high:g} to {far_high:g} (clipped high)",
            f"above {far_high:g}",
        ),
    )


def token_texts(token_ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[str]:
    """The text that each token adds to those before it.

    A character split over tokens is shown at its last one, with `◌` for the others; ids that make
    no text show as `⟨id⟩`.
    """
    texts: list[str] = []
    before: list[int] = []  # the last whole piece: some tokenizers write a first token differently
    pending: list[int] = []
    for token in token_ids:
        pending.append(token)
        text = decode([*before, *pending])[len(decode(before)) :] if before else decode(pending)
        if _UNDECODED not in text:
            texts += ["◌"] * (len(pending) - 1) + [text]
            before, pending = pending, []
        elif len(pending) == _MAX_PIECES:
            texts += [f"⟨{one}⟩" for one in pending]
            before, pending = [], []
    return texts + [f"⟨{one}⟩" for one in pending]


def visible(text: str) -> str:
    """`text` with every space, line end and control character to be seen."""
    if not text:
        return "∅"
    return "".join(_VISIBLE.get(one) or printable(one) for one in text)


def printable(text: str) -> str:
    """`text` with characters that could steer a terminal written as escapes; lines are kept."""
    return "".join(
        one if one.isprintable() or one == "\n" else one.encode("unicode_escape").decode()
        for one in text
    )


def render_tokens(row: TokenRow, scale: Scale | None) -> Text:
    """The row's tokens under its heading."""
    text = Text()
    text.append(f"{printable(row.heading)}\n", style="bold")
    for place, token in enumerate(row.texts):
        text.append(visible(token), style=_style(row, place, scale))
    return text


def render_legend(scale: Scale | None, *, weighted: bool, note: str = "") -> Text:
    """What the colours and the letters mean."""
    text = Text("dim: not trained", style="dim")
    text.append("  · space  ⏎ line end  ◌ part of a character", style="dim")
    if scale is not None:
        text.append(f"\n{scale.name}:", style="not dim")
        for style, words in zip(scale.styles, scale.words, strict=True):
            text.append("  ")
            text.append(f" {words} ", style=f"not dim {style}")
    if weighted:
        text.append("\nweight:  ", style="not dim")
        text.append(f"bold: above {HEAVY_WEIGHT:g}", style="not dim bold")
        text.append("  ")
        text.append(f"underlined: below {LIGHT_WEIGHT:g}", style="not dim underline")
    if note:
        text.append(f"\n{printable(note)}", style="dim italic")
    return text


def _style(row: TokenRow, place: int, scale: Scale | None) -> str:
    if not row.loss_mask[place]:
        return "dim"
    styles = []
    if scale is not None and row.values is not None:
        styles.append(scale.style(row.values[place]))
    if row.weights is not None:
        if row.weights[place] > HEAVY_WEIGHT:
            styles.append("bold")
        elif row.weights[place] < LIGHT_WEIGHT:
            styles.append("underline")
    return " ".join(filter(None, styles))


def _on(colour: str) -> str:
    return f"black on {colour}"
