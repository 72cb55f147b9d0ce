"""An explained answer as a user sees it: shades of tokens in a terminal, or a page.

Texts of models and data are inert in both: the terminal's come through `console`, the page's
through Jinja's autoescape and `contrasts.visible`.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from itune import __version__, console, contrasts

if TYPE_CHECKING:
    from itune import explaining

TEMPLATE = Path(__file__).with_name("explanation.html.jinja")
LARGEST = 10  # chosen: tokens of a prompt that are listed
# chosen: from these parts of the largest share on, a token has one, two or three signs.
LEVELS = (0.1, 1 / 3, 2 / 3)
# chosen: a probability below these is doubtful, or a guess.
DOUBTFUL, GUESSED = 0.5, 0.1
STYLES = {
    1: "green", 2: "bold green", 3: "black on green",
    -1: "red", -2: "bold red", -3: "black on red",
}  # fmt: skip


class Listed(NamedTuple):
    """A token of the prompt among those of the largest shares. place: counted from 1."""

    place: int
    token: explaining.Token
    share: float


def levels(shares: Sequence[float]) -> list[int]:
    """From -3 to 3: how large each share is beside the largest, with its sign."""
    most = max(map(abs, shares), default=0.0) or 1.0
    sizes = [sum(abs(each) >= part * most for part in LEVELS) for each in shares]
    return [size if each > 0 else -size for size, each in zip(sizes, shares, strict=True)]


def largest(found: explaining.Explanation) -> list[Listed]:
    """The tokens of a prompt that drove its answer most, either way."""
    every = [
        Listed(place, token, share)
        for place, (token, share) in enumerate(zip(found.prompt, found.shares, strict=True), 1)
    ]
    return heapq.nlargest(LARGEST, every, key=lambda each: abs(each.share))


def probability(value: float) -> str:
    """As few digits as tell it: 0.93, or 3e-05."""
    return f"{value:.2f}" if value >= 0.01 else f"{value:.0e}"


# --- the terminal ---------------------------------------------------------------------------


def show(screen: console.Screen, found: explaining.Explanation) -> None:
    """The answer's probabilities; the prompt in shades with signs, and its largest shares."""
    screen.shaded(
        "probability of each token of the answer",
        [
            console.Shade(token.text, token.control, _certain(each), probability(each))
            for token, each in zip(found.answer, found.probabilities, strict=True)
        ],
    )
    if not found.scores:
        return
    screen.shaded(
        "what drove the answer: + made it likelier, - less likely",
        [
            console.Shade(token.text, token.control, STYLES.get(level, "dim"), _signs(level))
            for token, level in zip(found.prompt, levels(found.shares), strict=True)
        ],
    )
    screen.table(
        "",
        ["token of the prompt", "place", "share"],
        [
            [console.spelt(each.token.text)[:40], str(each.place), f"{each.share:+.1%}"]
            for each in largest(found)
        ],
    )


def _certain(value: float) -> str:
    return "red" if value < GUESSED else "yellow" if value < DOUBTFUL else "green"


def _signs(level: int) -> str:
    return ("+" if level > 0 else "-") * abs(level)


# --- the page -------------------------------------------------------------------------------


def page(asked: Sequence[tuple[str, explaining.Explanation]], model: str) -> str:
    """Prompts and their explained answers as HTML that needs neither a network nor a script."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(visible=contrasts.visible, seen=_seen, probability=probability)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        asked=[_section(prompt, found) for prompt, found in asked],
        model=model,
        version=__version__,
    )


def _section(prompt: str, found: explaining.Explanation) -> dict[str, Any]:
    shares = found.shares
    most = max(map(abs, shares), default=0.0) or 1.0
    return {
        "prompt": prompt,
        "answer": list(zip(found.answer, found.probabilities, strict=True)),
        "input": [
            (token, share, round(abs(share) / most, 3))
            for token, share in zip(found.prompt, shares, strict=True)
        ]
        if shares
        else [],
        "largest": largest(found) if shares else [],
    }


def _seen(text: str) -> str:
    """A token's text with its ends of lines to be seen; they still end a line."""
    return contrasts.visible(text).replace("\n", "\u21b5\n")
