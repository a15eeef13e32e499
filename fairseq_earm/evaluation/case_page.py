"""A page of single translations: where they differ from the reference, and every token's energy as a colour (Wang et al., Table 12).

log μ_k, the logsumexp of the logits at step k, is minus the energy that a model gives to the words before step k (Eq. 4). A
colour tells how far a token's energy −log μ_k is from the model's mean: only differences within a model mean anything.
"""
from __future__ import annotations

import re
from difflib import SequenceMatcher
from html import escape
from itertools import combinations
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from fairseq_earm.evaluation.page import Html, markup, page, table

# Okabe and Ito's blue and orange, which colour-blind people tell apart. At half strength text is readable on them, light or dark.
LOW, HIGH = (0, 114, 178), (230, 159, 0)
STRONGEST = 0.5
# So much of all tokens is inside the scale: a few outliers do not make the others pale.
INSIDE_SCALE = 95


class Piece(NamedTuple):
    """A token of a translation.

    Attributes:
        text: what it adds to the text, which is all of them in a row; with its space before it.
        energy: −log μ_k at its step, in nats.
        log_q: its log-probability; None for the step after the last token, at which nothing is said.
        name: what it is called in tables.
    """

    text: str
    energy: float
    log_q: Optional[float]
    name: str


class Translation(NamedTuple):
    """What a system made of a source; `pieces` is empty where only its text is known."""

    system: str
    text: str
    pieces: Sequence[Piece] = ()


class Case(NamedTuple):
    """A sentence pair by its number in the split, and the translations of all systems."""

    index: int
    source: str
    reference: str
    translations: Sequence[Translation]


def disagreement(texts: Sequence[str]) -> float:
    """How much texts differ from each other: 0 all the same, 1 without a word in common; the mean over their pairs."""
    pairs = list(combinations([text.split() for text in texts], 2))
    if not pairs:
        return 0.0
    return sum(1 - SequenceMatcher(None, one, other, autojunk=False).ratio() for one, other in pairs) / len(pairs)


def differences(text: str, reference: str) -> Tuple[List[Tuple[int, int]], Dict[int, str]]:
    """Where a text is not as the reference.

    Returns:
        Spans of characters of the words that differ; and place in the text → words of the reference that are left out there.
    """
    words = [match.span() for match in re.finditer(r"\S+", text)]
    expected = reference.split()
    matcher = SequenceMatcher(None, expected, [text[start:end] for start, end in words], autojunk=False)
    spans, left_out = [], {}
    for kind, from_expected, to_expected, at, end in matcher.get_opcodes():
        if kind in ("replace", "insert"):
            spans += words[at:end]
        elif kind == "delete":
            left_out[words[at - 1][1] if at else 0] = " ".join(expected[from_expected:to_expected])
    return spans, left_out


class Scale(NamedTuple):
    """Colours of energies: each model's mean over the page, and the distance from it, in nats, at which colours are strongest."""

    means: Dict[str, float]
    limit: float

    def deviation(self, system: str, energy: float) -> float:
        """Nats above (below: negative) the model's mean."""
        return energy - self.means[system]

    def colour(self, deviation: float) -> str:
        """A CSS colour: blue below the mean, orange above it, the stronger the farther."""
        strength = STRONGEST * min(1.0, abs(deviation) / self.limit)
        red, green, blue = LOW if deviation < 0 else HIGH
        return f"rgba({red},{green},{blue},{strength:.3f})"


def scale_of(cases: Sequence[Case]) -> Scale:
    """The scale on which all energies of a page are shown."""
    energies: Dict[str, List[float]] = {}
    for case in cases:
        for translation in case.translations:
            energies.setdefault(translation.system, []).extend(piece.energy for piece in translation.pieces)
    means = {system: float(np.mean(values)) for system, values in energies.items() if values}
    distances = [abs(value - means[system]) for system in means for value in energies[system]]
    limit = float(np.percentile(distances, INSIDE_SCALE)) if distances else 0.0
    return Scale(means, max(0.1, round(limit, 1)))


def case_page(cases: Sequence[Case], *, title: str, chosen: str, origins: Dict[str, str]) -> str:
    """The page, a whole HTML document.

    Args:
        cases: what is shown.
        title: heading.
        chosen: how the sentences were chosen, in a sentence.
        origins: system → the file it came from.
    """
    scale = scale_of(cases)
    sections = "\n".join(_section(case, scale) for case in cases)
    return page(title, f"{_introduction(cases, scale, chosen, origins)}\n{sections}", STYLE)


def _introduction(cases: Sequence[Case], scale: Scale, chosen: str, origins: Dict[str, str]) -> str:
    marks = (
        '<p><u>Underlined bold words</u> are not those of the reference at this place; <span class="gap">‸</span> stands where '
        "words of the reference are left out.</p>"
    )
    lines = [f"<p>{escape(chosen)}</p>", marks]
    if scale.means:
        lines += [_legend(scale)]
    counts = {
        system: sum(len(t.pieces) for case in cases for t in case.translations if t.system == system) for system in origins
    }
    rows = [
        [system, origin, *((_number(scale.means[system], 3), counts[system]) if system in scale.means else ("–", "–"))]
        for system, origin in origins.items()
    ]
    lines.append(table(["system", "file", "mean energy, nats", "tokens"], rows))
    return "\n".join(lines)


def _legend(scale: Scale) -> str:
    steps = [step * scale.limit for step in (-1, -0.5, 0, 0.5, 1)]
    swatches = " ".join(
        f'<span class="piece" style="background:{scale.colour(step)}">{_signed(step, 2)}</span>' for step in steps
    )
    return (
        "<p>Colours are a model’s own energies: −log μ<sub>k</sub>, minus the logsumexp of its logits at the step of each token, "
        "end-of-sentence (<code>&lt;/s&gt;</code>) included, compared with the model’s mean over this page. Blue is below it, which "
        "the model as an energy-based model prefers. Cross-entropy leaves these energies as they happen to be; E-ARM trains "
        "them.</p>\n"
        f'<p class="legend">nats from the mean: {swatches} <span class="soft">and beyond</span></p>'
    )


def _section(case: Case, scale: Scale) -> str:
    rows = [_row("source", markup(case.source)), _row("reference", markup(case.reference))]
    for translation in case.translations:
        rows.append(_row(translation.system, _translation(translation, case.reference, scale)))
    lines = "\n".join(rows)
    return f"<section>\n<h2>Sentence {case.index}</h2>\n<dl>\n{lines}\n</dl>\n</section>"


def _row(name: str, content: str) -> str:
    return f"<dt>{markup(name)}</dt>\n<dd>{content}</dd>"


def _translation(translation: Translation, reference: str, scale: Scale) -> str:
    marks = _Marks(translation.text, reference)
    if not translation.pieces:
        return marks.rest() or '<span class="soft">nothing</span>'
    shown = "".join(_piece(translation.system, piece, marks, scale) for piece in translation.pieces)
    log_q = sum(piece.log_q for piece in translation.pieces if piece.log_q is not None)
    tokens = sum(piece.log_q is not None for piece in translation.pieces)
    figures = f"{tokens} tokens, log q {_number(log_q, 2)}, log μ {_number(-translation.pieces[-1].energy, 3)}"
    rows = [
        [
            piece.name, _number(piece.energy, 3), _signed(scale.deviation(translation.system, piece.energy), 3),
            "–" if piece.log_q is None else _number(piece.log_q, 3),
        ]
        for piece in translation.pieces
    ]
    every = table(["token", "energy", "from the mean", "log q"], rows, caption="nats")
    return f'{shown}\n<details><summary>{figures}</summary>\n{every}\n</details>'


def _piece(system: str, piece: Piece, marks: "_Marks", scale: Scale) -> str:
    deviation = scale.deviation(system, piece.energy)
    inside = piece.text.lstrip()
    space = marks.take(len(piece.text) - len(inside))
    # What adds nothing to the text, end-of-sentence above all, is shown by its name.
    text = marks.take(len(inside)) if inside else f" <small>{escape(piece.name)}</small>"
    title = f"{piece.name}: energy {_number(piece.energy, 3)}, {_signed(deviation, 3)} from the mean"
    return f'{space}<span class="piece" style="background:{scale.colour(deviation)}" title="{escape(title)}">{text}</span>'


class _Marks:
    """A text given out as HTML bit by bit, its differences from the reference marked."""

    def __init__(self, text: str, reference: str):
        self.text = text
        self.at = 0
        spans, self.left_out = differences(text, reference)
        self.differs = [any(start <= place < end for start, end in spans) for place in range(len(text))]

    def take(self, count: int) -> Html:
        """The next characters."""
        out, end = [], min(self.at + count, len(self.text))
        while self.at < end:
            out.append(self._gap())
            stop = self.at + 1
            while stop < end and self.differs[stop] == self.differs[self.at] and stop not in self.left_out:
                stop += 1
            part = escape(self.text[self.at:stop])
            out.append(f"<u>{part}</u>" if self.differs[self.at] else part)
            self.at = stop
        if self.at == len(self.text):
            out.append(self._gap())
        return Html("".join(out))

    def rest(self) -> Html:
        """All that is left of it."""
        return self.take(len(self.text) - self.at)

    def _gap(self) -> str:
        words = self.left_out.pop(self.at, None)
        if words is None:
            return ""
        return f'<span class="gap" title="left out: {escape(words)}">‸</span>'


def _number(value: float, digits: int) -> str:
    """With a real minus sign, which nothing that rounds to zero has."""
    text = f"{value:.{digits}f}"
    return (text if float(text) else text.lstrip("-")).replace("-", "−")


def _signed(value: float, digits: int) -> str:
    text = _number(value, digits)
    return f"+{text}" if float(text.replace("−", "-")) > 0 else text


STYLE = """\
dl { display: grid; grid-template-columns: minmax(6rem, max-content) minmax(0, 1fr); gap: .35rem 1rem; margin: .5rem 0; }
dt { color: var(--soft); max-width: 14rem; }
dd { margin: 0; max-width: 60rem; }
dd > details { margin: .1rem 0 .4rem; font-size: .9rem; }
.piece { border-radius: 3px; padding: .12em 0; box-decoration-break: clone; -webkit-box-decoration-break: clone; }
.legend .piece { padding: .15em .5em; border: 1px solid var(--line); white-space: nowrap; }
u { font-weight: 700; text-decoration: underline 2px; text-underline-offset: .2em; }
.gap { font-weight: 700; color: var(--soft); padding: 0 .1em; }
@media (max-width: 40rem) { dl { grid-template-columns: minmax(0, 1fr); gap: .1rem; } dt { margin-top: .5rem; } }"""
