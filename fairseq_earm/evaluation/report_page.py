"""One page about one or several training runs: settings, curves, results, samples, environment."""
from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

from fairseq_earm.evaluation.curves import RUN_COLOURS, Curve, drawable, panel, settled_range
from fairseq_earm.evaluation.log_panels import PANELS, Panel, logged_keys, undrawn_keys
from fairseq_earm.evaluation.page import figure, page, table
from fairseq_earm.evaluation.report_tables import environment, settings, summary
from fairseq_earm.evaluation.run_folder import Run
from fairseq_earm.evaluation.samples_of_runs import Sample
from fairseq_earm.evaluation.score_tables import Table
from fairseq_earm.evaluation.training_log import (
    EPOCHS, INNER, earm_entry, is_residual, logged_names, series, validated_kinds,
)

STYLE = """\
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; padding: 0; margin: .5rem 0; list-style: none; }
.legend span { display: inline-block; width: 1.4rem; height: .25rem; margin-right: .4rem; vertical-align: middle; }
td { min-width: 6rem; }"""
VALIDATED = ("o--", "s:", "^-.", "v--")
DRAWN_AS = ("dashed with dots", "dotted with squares", "dash-dotted with triangles", "dashed with triangles")


def report_page(
    runs: Sequence[Run], *, title: str, results: Sequence[Tuple[str, Sequence[Table]]] = (), unknown: Sequence[str] = (),
    samples: Sequence[Tuple[str, Sequence[Sample]]] = (), notes: Sequence[str] = (),
) -> str:
    """The whole page as HTML; what was not logged is not shown, and the page says so.

    Args:
        runs: at most as many as there are `RUN_COLOURS`.
        results: (file, what one of the package's commands wrote into it).
        unknown: JSON files that none of them wrote.
        samples: (how they were found, sentences with each run's translation).
        notes: more that the reader should know, a sentence each.
    """
    everything = [note for run in runs for note in (*run.notes, *_silences(run))] + list(notes)
    body = [
        _section("Summary", summary(runs)),
        *([_list(everything)] if everything else []),
        _section("Settings", settings(runs)),
        _section("Curves", _curves(runs)),
        _section("Results", _results(results, unknown)),
        _section("Samples", _samples(samples, runs)),
        _section("Environment", environment(runs)),
    ]
    return page(title, "\n".join(body), STYLE)


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>"


def _list(sentences: Sequence[str]) -> str:
    return "<ul>\n" + "\n".join(f"<li>{escape(sentence)}</li>" for sentence in sentences) + "\n</ul>"


def _silences(run: Run) -> List[str]:
    """What a run's log does not hold."""
    keys = logged_names(run.history)
    said = []
    if run.history and "earm_loss" not in keys and not is_residual(run.history):
        said.append("no E-ARM figures logged: a cross-entropy run, or one that E-ARM has not entered yet")
    if "earm_loss" in keys and "earm_dv" not in keys:
        said.append("no energies logged: a control, which has E-ARM's likelihood terms alone")
    if run.history and not validated_kinds(run.history):
        said.append("no validation logged")
    if run.checkpoint is None:
        said.append("no checkpoint: the settings are unknown")
    return [f"{run.name}: {'; '.join(said)}."] if said else []


def _curves(runs: Sequence[Run]) -> str:
    if not any(run.history for run in runs):
        return "<p>No log was found.</p>"
    coloured = [(colour, run.name) for colour, run in zip(RUN_COLOURS, runs) if run.history]
    legend = "\n".join(f'<li><span style="background: {colour}"></span>{escape(name)}</li>' for colour, name in coloured)
    entries, keys = _entries(runs), [logged_keys(run.history) for run in runs]
    panels = [drawn for drawn in (_panel(each, runs, keys, entries) for each in PANELS) if drawn]
    undrawn = sorted({key for run in runs for key in undrawn_keys(run.history)})
    entered = "A dotted vertical line marks the first record with E-ARM. " if entries else ""
    said = f'<p class="soft">{entered}{_kinds_drawn(runs)}Long curves show means over stretches.</p>'
    left = f'<p class="soft">Logged, and not drawn: {escape(", ".join(undrawn))}.</p>' if undrawn else ""
    return f'<ul class="legend">\n{legend}\n</ul>\n{said}\n<div class="figures">\n' + "\n".join(panels) + f"\n</div>\n{left}"


def _kinds(runs: Sequence[Run]) -> List[str]:
    return list(dict.fromkeys(kind for run in runs for kind in validated_kinds(run.history)))


def _kinds_drawn(runs: Sequence[Run]) -> str:
    drawn = [f"{kind}: {DRAWN_AS[number % len(DRAWN_AS)]}" for number, kind in enumerate(_kinds(runs))]
    return f"Solid lines are training; {escape(', '.join(drawn))}. " if drawn else ""


def _entries(runs: Sequence[Run]) -> List[Tuple[float, str]]:
    """(update, colour) where E-ARM enters."""
    entries = [(earm_entry(run.history), colour) for colour, run in zip(RUN_COLOURS, runs)]
    return [(update, colour) for update, colour in entries if update is not None]


def _panel(
    each: Panel, runs: Sequence[Run], keys: Sequence[Dict[str, str]], entries: Sequence[Tuple[float, str]]
) -> Optional[str]:
    """The panel's figure; None where no run has anything for it."""
    kinds = _kinds(runs)
    drawn = zip(RUN_COLOURS, runs, keys)
    curves = [curve for colour, run, own in drawn for curve in _lines(each, run, own, colour, kinds)]
    if not curves:
        return None
    limits = settled_range(curves) if each.settles else None
    cut = " The axis is cut: the beginning lies outside." if limits else ""
    svg = panel(curves, each.ylabel, zero=each.zero, log=each.log, limits=limits, entries=entries)
    return f"<div>\n<h3>{escape(each.title)}</h3>\n{figure(svg, each.says + cut)}\n</div>"


def _lines(each: Panel, run: Run, keys: Dict[str, str], colour: str, kinds: Sequence[str]) -> List[Curve]:
    """The run's curves in a panel, as far as there is anything to draw."""
    found = []
    for key, style in [(keys[name], style) for name, style in each.lines if name in keys]:
        train = series(run.history.get(INNER, []), key)
        found.append(Curve(train if train[0] else series(run.history.get(EPOCHS, []), key), colour, style))
        if each.validated:
            found += [
                Curve(series(run.history.get(kind, []), key), colour, VALIDATED[number % len(VALIDATED)])
                for number, kind in enumerate(kinds)
            ]
    drawn = [curve._replace(points=drawable(curve.points)) for curve in found]
    return [curve for curve in drawn if curve.points[0]]


def _results(results: Sequence[Tuple[str, Sequence[Table]]], unknown: Sequence[str]) -> str:
    parts = []
    for path, tables in results:
        parts.append(f"<h3>{escape(path)}</h3>")
        parts += [table(each.header, each.rows, each.title) for each in tables]
    if unknown:
        parts.append(f'<p class="soft">JSON of other programs, not shown: {escape(", ".join(unknown))}.</p>')
    return "\n".join(parts) or "<p>No results of fairseq-earm's commands (their --json) were found beside the runs.</p>"


def _samples(samples: Sequence[Tuple[str, Sequence[Sample]]], runs: Sequence[Run]) -> str:
    parts = []
    for origin, sentences in samples:
        parts.append(f'<p class="soft">From {escape(origin)}</p>')
        for sample in sentences:
            rows = [("source", sample.source), ("reference", sample.reference), *sample.outputs.items()]
            parts.append(table(["", f"sentence {sample.number}"], [row for row in rows if row[1] is not None]))
    for run in runs:
        for path in run.pictures:
            parts.append(_picture(path, f"{run.name}: {path.name}"))
    return "\n".join(parts) or "<p>No output of fairseq-generate and no images were found beside the runs.</p>"


def _picture(path: Path, caption: str) -> str:
    try:
        return figure(path.read_bytes(), caption)
    except (OSError, ValueError):  # it was removed or written anew since it was found
        return f'<p class="soft">{escape(caption)} cannot be read.</p>'
