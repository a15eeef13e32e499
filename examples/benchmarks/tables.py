"""What every table of the benchmarks has: a setting to measure in, columns, and a form to be printed in."""
from __future__ import annotations

from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional

import torch
from timing import device, machine, markdown

Row = Dict[str, object]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Setting(NamedTuple):
    """What holds for all tables.

    Attributes:
        rounds: turns of each variant, after two calls to warm it up.
        threads: of the processor.
        dtype: name of the numbers' type, for what runs without gradients.
        checkpoint, data: a trained model for translation and the folder of its dictionaries, for natural lengths.
    """

    rounds: int = 5
    threads: int = 1
    dtype: str = "float32"
    checkpoint: Optional[str] = None
    data: Optional[str] = None

    def place(self, model):
        """The model on the device and in the precision of this setting."""
        return model.to(device(), DTYPES[self.dtype])


class Table(NamedTuple):
    """A table that `run.py` can make.

    Attributes:
        title: its heading.
        columns: how the figures of each column are written, as by `format`; none for what is printed as it is.
        measure: its rows, for a setting and its sizes.
        quick, full: the sizes, for some minutes on one core and for as long as it takes.
        plot: draws the rows into a file.
    """

    title: str
    columns: Dict[str, str]
    measure: Callable[..., List[Row]]
    quick: dict = {}
    full: dict = {}
    plot: Optional[Callable[[List[Row], Path], None]] = None


def show(table: Table, rows: List[Row], setting: Setting) -> str:
    """Title, machine and rows; a figure that is missing is a dash."""
    lines = [[_cell(row.get(column), form) for column, form in table.columns.items()] for row in rows]
    where = f"{machine()}, {setting.dtype}; median of {setting.rounds} rounds"
    return f"## {table.title}\n\n{where}\n\n{markdown(list(table.columns), lines)}\n"


def _cell(value, form: str) -> str:
    return "-" if value is None or value != value else format(value, form)
