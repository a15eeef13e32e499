"""The same sentences translated by several runs, from what fairseq-generate printed for each."""
from __future__ import annotations

from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

from fairseq_earm.errors import UsageError
from fairseq_earm.evaluation.generated import Generated, read_generated
from fairseq_earm.evaluation.run_folder import Run


class Sample(NamedTuple):
    """One sentence; `outputs` by the name of the run, and of the file where a run has several."""

    number: int
    source: Optional[str]
    reference: Optional[str]
    outputs: Dict[str, str]


def samples_of_runs(runs: Sequence[Run], count: int) -> Tuple[List[Tuple[str, List[Sample]]], List[str]]:
    """The first sentences of each set that was translated, runs side by side where they translated the same.

    Returns:
        (files, sentences) of each set, and a note on each file that cannot be used.
    """
    sets: Dict[tuple, List[Tuple[Run, str, Generated]]] = {}
    notes = []
    for run in runs:
        for path in run.generated:
            try:
                found = read_generated(str(path))
            except UsageError as error:
                notes.append(f"{run.name}: no samples are shown of {str(error).partition('error: ')[2]}.")
                continue
            same = tuple(tuple(lines or ()) for lines in (found.sources, found.references))
            sets.setdefault(same, []).append((run, str(path), found))
    return [(", ".join(path for _, path, _ in files), _sentences(files, count)) for files in sets.values()], notes


def _sentences(files: Sequence[Tuple[Run, str, Generated]], count: int) -> List[Sample]:
    names = [run.name for run, _, _ in files]
    labels = [run.name if names.count(run.name) == 1 else f"{run.name}, {path}" for run, path, _ in files]
    first = files[0][2]
    return [
        Sample(
            number, first.sources and first.sources[number], first.references and first.references[number],
            {label: found.detokenised[number] for label, (_, _, found) in zip(labels, files)},
        )
        for number in range(min(count, len(first.detokenised)))
    ]
