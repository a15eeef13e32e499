"""HTML pages that are one file: no external resource, no script but the page's own, light and dark, for wide and narrow windows."""
from __future__ import annotations

import base64
import hashlib
import re
from html import escape, unescape
from typing import Iterable, Sequence, Union

PNG = b"\x89PNG\r\n\x1a\n"
UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
NUMBER = re.compile(r"\s*[-+−±]?\d[\d,.]*(e[-+]?\d+)?\s*(%|s|±.*|\(.*|\[.*)?\s*")

# The policy keeps the promise of the first line even for a page whose body forgot to escape something.
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:{policy}">
<title>{title}</title>
<style>
{style}
</style>
</head>
<body>
<h1>{title}</h1>
{body}{script}
</body>
</html>
"""

STYLE = """\
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --soft: #595959; --line: #cfcfcf; --tint: #f2f4f7; --accent: #0b5fa5; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --paper: #16181b; --soft: #a8a8a8; --line: #43474d; --tint: #22262b; --accent: #7fbcf5; }
}
* { box-sizing: border-box; }
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 76rem; margin: 0 auto; padding: 1rem; color: var(--ink); background: var(--paper);
  overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .5rem 0 1rem; }
h2 { font-size: 1.25rem; margin: 2rem 0 .5rem; padding-top: .5rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.5rem 0 .5rem; }
p { max-width: 50rem; margin: .5rem 0; }
a { color: var(--accent); }
.soft, figcaption, caption { color: var(--soft); font-size: .9rem; }
code, pre { font: .9em/1.45 ui-monospace, monospace; }
pre { white-space: pre-wrap; background: var(--tint); padding: .6rem; border-radius: 4px; }
details { margin: .5rem 0; }
summary { cursor: pointer; color: var(--accent); }
.scroll { overflow-x: auto; margin: .5rem 0 1rem; }
table { border-collapse: collapse; overflow-wrap: normal; }
caption { text-align: left; padding-bottom: .3rem; }
th, td { text-align: left; vertical-align: top; padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--line); }
thead th { border-bottom: 2px solid var(--line); vertical-align: bottom; }
tbody th { font-weight: 600; position: sticky; left: 0; background: var(--paper); min-width: min(13rem, 30vw); max-width: 40vw; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
figure { margin: .5rem 0 1rem; }
figure svg, figure img { display: block; max-width: 100%; height: auto; }
figcaption { max-width: 50rem; margin-top: .2rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: 0 1.5rem; }
.figures h3 { margin: .5rem 0 0; }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }"""


class Html(str):
    """Text that is HTML already, and is not escaped again."""


def markup(value: object) -> str:
    """A value as HTML: escaped, unless it is `Html`."""
    return value if isinstance(value, Html) else escape(str(value))


def page(title: str, body: str, style: str = "", script: str = "") -> str:
    """A whole HTML document.

    Args:
        title: plain text, the window's title and the page's heading.
        body: HTML.
        style: rules of this page's own, after those that all pages share. Classes these have: `soft` for what matters less,
            `scroll` for what may be wider than the window, `number`, `figures` for a grid of figures.
        script: the only one that runs, at the end of the body.
    """
    # In one pass: nothing that is put in is searched for the other places.
    parts = {"title": escape(title), "style": f"{STYLE}\n{style}".strip(), "body": body, "script": "", "policy": ""}
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        parts.update(script=f"\n<script>{script}</script>", policy=f"; script-src 'sha256-{digest}'")
    return printable(re.sub(r"\{(title|style|body|script|policy)\}", lambda place: parts[place.group(1)], PAGE))


def printable(text: str) -> str:
    """A page without what no page may hold: control characters, and halves of surrogate pairs, which no encoding has.

    Marks that turn the direction of text stay; they end with the paragraph, cell or line of the list that they are in.
    """
    return UNPRINTABLE.sub("\ufffd", text)


def figure(picture: bytes, caption: str) -> Html:
    """A picture in the page itself, SVG inline or PNG as data, with its caption, which also is its alternative text.

    Raises:
        ValueError: it is neither SVG nor PNG.
    """
    if picture.startswith(PNG):
        data = base64.b64encode(picture).decode()
        shown = f'<img src="data:image/png;base64,{data}" alt="{escape(_plain(caption))}">'
    else:
        text = picture.decode("utf-8")
        start = text.find("<svg")
        if start < 0:
            raise ValueError("a picture that is neither SVG nor PNG")
        shown = f'<svg role="img" aria-label="{escape(_plain(caption))}"{text[start + len("<svg"):].rstrip()}'
    return Html(f"<figure>\n{shown}\n<figcaption>{markup(caption)}</figcaption>\n</figure>")


def _plain(caption: str) -> str:
    return unescape(re.sub(r"<[^>]*>", "", caption)) if isinstance(caption, Html) else caption


def table(header: Sequence[object], rows: Iterable[Sequence[Union[object, Html]]], caption: str = "") -> Html:
    """A table in a box of its own that scrolls sideways where the window is narrow.

    Every cell is escaped, unless it is `Html`. The first cell of a row names it; columns of numbers stand to the right.

    Args:
        header: one cell a column.
        rows: as many cells each.
    """
    rows = [list(row) for row in rows]
    columns = list(zip(*rows)) or [()] * len(header)
    numeric = [number > 0 and _is_numeric(column) for number, column in enumerate(columns)]
    head = "".join(_cell("th scope=\"col\"", cell, right) for cell, right in zip(header, numeric))
    lines = [
        "".join(_cell('th scope="row"' if not number else "td", cell, right) for number, (cell, right) in enumerate(zip(row, numeric)))
        for row in rows
    ]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    title = f"<caption>{markup(caption)}</caption>\n" if caption else ""
    return Html(
        f'<div class="scroll" tabindex="0">\n<table>\n{title}<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>\n</div>'
    )


def _is_numeric(column: Sequence[object]) -> bool:
    """Whether all that is said in a column are numbers, with a unit or a spread."""
    cells = [str(cell) for cell in column if str(cell).strip() not in ("", "-", "–")]
    return bool(cells) and all(NUMBER.fullmatch(cell) for cell in cells)


def _cell(tag: str, content: object, right: bool) -> str:
    kind = ' class="number"' if right else ""
    return f"<{tag}{kind}>{markup(content)}</{tag.split()[0]}>"
