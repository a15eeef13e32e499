"""A page on which people choose between the texts of two systems without knowing which is whose (Deng et al. 2020, Table 2).

The page is one HTML file that needs nothing else and no connection; a key, kept apart from it, says what was shown where.
"""
from __future__ import annotations

import hashlib
import random
from html import escape
from typing import List, NamedTuple, Optional, Sequence

from fairseq_earm.errors import UsageError
from fairseq_earm.evaluation.page import page

# A shuffled text of fewer different words could pass for a real one.
FEWEST_WORDS = 4


class Pair(NamedTuple):
    """Two texts side by side; `left_is` names the system, or "real" and "shuffled" for an attention check."""

    line: int
    prefix: str
    left: str
    right: str
    left_is: str


def choose_pairs(
    a: Sequence[str], b: Sequence[str], prefixes: Optional[Sequence[str]], real: Sequence[str], *,
    items: int, checks: int, seed: int,
) -> List[Pair]:
    """Lines drawn without replacement, on sides drawn by coin; among them attention checks, a real text beside its own words
    in random order. A line is either among the pairs or among the checks: no text is met twice.

    Args:
        a, b: texts of the systems "A" and "B", line by line after the same prefixes. Where they agree, there is nothing to
            choose between, and the line is left out.
        prefixes: what both continue, or None.
        real: texts for the attention checks, after the same prefixes too.
    Raises:
        UsageError: files of different lengths, or fewer usable lines than asked for.
    """
    _check_lengths(a, b, prefixes, real)
    rng = random.Random(seed)
    differing = [i for i, (one, other) in enumerate(zip(a, b)) if one.strip() != other.strip()]
    shufflable = [i for i, text in enumerate(real) if len(set(text.split())) >= FEWEST_WORDS]
    _check_count("--items", items, differing, "lines differ between the two files")
    chosen = rng.sample(differing, items)
    left = sorted(set(shufflable) - set(chosen))
    _check_count("--checks", checks, left, f"lines outside the pairs have {FEWEST_WORDS} different words or more to shuffle")
    given = prefixes or [""] * len(a)
    pairs = [_on_a_side(rng, i, given[i], a[i], b[i], "A", "B") for i in chosen]
    for i in rng.sample(left, checks):
        pairs.append(_on_a_side(rng, i, given[i], real[i], _shuffled(real[i], rng), "real", "shuffled"))
    rng.shuffle(pairs)
    return pairs


def _check_lengths(a, b, prefixes, real) -> None:
    others = {"the second file": b, "--prefixes": prefixes, "--real": real}
    for name, lines in others.items():
        if lines is not None and len(lines) != len(a):
            raise UsageError(f"{name} has {len(lines)} lines and the first file {len(a)}: line i of all must belong together")


def _check_count(flag: str, wanted: int, usable: Sequence[int], what: str) -> None:
    if wanted > len(usable):
        raise UsageError(f"{flag} {wanted}: only {len(usable)} {what}; give fewer, or more text")


def _on_a_side(rng: random.Random, line: int, prefix: str, one: str, other: str, name: str, other_name: str) -> Pair:
    if rng.random() < 0.5:
        return Pair(line, prefix, one, other, name)
    return Pair(line, prefix, other, one, other_name)


def _shuffled(text: str, rng: random.Random) -> str:
    words = text.split()
    while words == text.split():
        rng.shuffle(words)
    return " ".join(words)


def page_and_key(pairs: Sequence[Pair], title: str) -> tuple:
    """The page as HTML, and its key: {"page": a name that the answers will carry too, "items": [...]}."""
    sections = "\n".join(_section(number, pair, len(pairs)) for number, pair in enumerate(pairs))
    name = hashlib.sha256(sections.encode("utf-8", "replace")).hexdigest()[:16]
    items = [{"item": number, "line": pair.line, "left": pair.left_is} for number, pair in enumerate(pairs)]
    body = f"{INTRODUCTION}\n{sections}\n{END}"
    return page(title, body, STYLE, script=SCRIPT.replace("{name}", name)), {"page": name, "items": items}


def _section(number: int, pair: Pair, of: int) -> str:
    sides = "\n".join(
        f'<label><input type="radio" name="{number}" value="{side}"> <span>{escape(text)}</span></label>'
        for side, text in (("left", pair.left), ("right", pair.right))
    )
    prefix = f"<p>{escape(pair.prefix)} …</p>\n" if pair.prefix else ""
    return f"<section>\n<h2>{number + 1} of {of}</h2>\n{prefix}<div>\n{sides}\n</div>\n</section>"


STYLE = """\
section { border-top: 1px solid var(--line); padding-bottom: 1em; }
h2 { font-size: 1em; border: 0; margin-top: 1em; }
section p, label span { white-space: pre-wrap; }
section div { display: flex; flex-wrap: wrap; gap: 1em; }
section label { flex: 1 1 20em; border: 1px solid var(--line); border-radius: 4px; padding: .7em; cursor: pointer; }
label:focus-within { outline: 3px solid var(--accent); }
button, input { font: inherit; padding: .2em .6em; }
#state { margin-left: 1em; }"""

INTRODUCTION = """\
<p>Which text is the better one, or the better continuation of what stands above it? Choose one of each pair, the better by
however little. At the end, download your answers.</p>
<p><label>Your name or a pseudonym <input id="rater"></label></p>"""

END = '<p><button id="download">Download answers</button><span id="state" role="status"></span></p>'

SCRIPT = """\
"use strict";
const page = "{name}", store = "answers-" + page;
const total = document.querySelectorAll("section").length;
function collect() {
  const answers = {};
  document.querySelectorAll("input[type=radio]:checked").forEach(box => { answers[box.name] = box.value; });
  return { page: page, rater: document.getElementById("rater").value.trim(), answers: answers };
}
function show() {
  const open = total - Object.keys(collect().answers).length;
  document.getElementById("state").textContent = open ? open + " of " + total + " still open" : "all answered";
}
document.addEventListener("change", () => {
  show();
  try { localStorage.setItem(store, JSON.stringify(collect())); } catch (error) { /* no storage: nothing to restore */ }
});
document.getElementById("download").addEventListener("click", () => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(collect(), null, 1)], { type: "application/json" }));
  link.download = "answers-" + page + ".json";
  link.click();
});
try {
  const saved = JSON.parse(localStorage.getItem(store) || "null");
  if (saved) {
    document.getElementById("rater").value = saved.rater;
    for (const [name, value] of Object.entries(saved.answers)) {
      document.querySelector('input[name="' + name + '"][value="' + value + '"]').checked = true;
    }
  }
} catch (error) { /* no storage, or what it holds is not ours */ }
show();"""
