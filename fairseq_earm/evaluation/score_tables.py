"""Small tables of scores as text and as LaTeX."""
from __future__ import annotations

import re
import statistics
from typing import List, NamedTuple, Sequence

from fairseq_earm.errors import CONTROL

# LaTeX takes "[" and "*" after a row's end for options of it.
LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "±": r"$\pm$", "∞": r"$\infty$", **{letter: "{" + letter + "}" for letter in "[*"},
    **{letter: "\\" + letter for letter in "&%$#_{}"},
}
SIGNED = re.compile(r"(?<![\w.])[+-](?=\d)")


class Table(NamedTuple):
    """A title, the header's cells, and rows of as many cells; the first column names the row."""

    title: str
    header: List[str]
    rows: List[List[str]]


def mean_and_spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean ± sample standard deviation; of one value the value, of none a dash."""
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def text_table(table: Table) -> str:
    """The title, and the columns set out with spaces, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(table.header, *table.rows)]
    lines = [table.title] if table.title else []
    for first, *cells in (table.header, *table.rows):
        aligned = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:]))]
        lines.append("  ".join(aligned).rstrip())
    return "\n".join(lines)


def latex_table(table: Table) -> str:
    """A `tabular` that needs no package, under its title as a comment."""
    rows = [" & ".join(map(latex, row)) + r" \\" for row in (table.header, *table.rows)]
    body = [r"\hline", rows[0], r"\hline", *rows[1:], r"\hline"]
    columns = "l" + "r" * (len(table.header) - 1)
    return "\n".join([latex_comment(table.title), rf"\begin{{tabular}}{{{columns}}}", *body, r"\end{tabular}"])


def latex(cell: str) -> str:
    """A cell's text with what LaTeX would take for its own escaped, and signs of numbers set as such, on one line."""
    cell = CONTROL.sub(" ", cell)
    signed = SIGNED.split(cell)
    signs = [f"${sign}$" for sign in SIGNED.findall(cell)] + [""]
    return "".join("".join(LATEX.get(letter, letter) for letter in part) + sign for part, sign in zip(signed, signs))


def latex_comment(text: str) -> str:
    """Lines behind LaTeX's comment sign; a carriage return alone ends a line too, as it does for TeX."""
    return "\n".join(f"% {line}".rstrip() for line in text.splitlines() or [""])
