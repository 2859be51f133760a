"""`metrics.csv`: the curves of a run for those who plot themselves."""

import csv
from collections.abc import Mapping, Sequence
from io import StringIO
from itertools import chain
from pathlib import Path
from typing import Any

from cifar_transfer.base.files import write_text

METRICS = "metrics.csv"  # in the folder of a run
OF_EPOCH = "trainable_parameters"  # a column that only rows of epochs fill


class MetricsFile:
    """A row for each step and each epoch that is logged, written at once; what is in the file stays.

    Args:
        run: Folder of the run.
    """

    def __init__(self, run: Path) -> None:
        self.path = run / METRICS
        self._columns = list(next(iter(_read(self.path)), ()))
        self._row: dict[str, Any] = {}  # not yet written

    def add(self, epoch: int | None, step: int | None, metrics: Mapping[str, float]) -> None:
        """Add what is logged of a step; what comes before `flush` for the same one goes into the same row."""
        if step != self._row.get("step") or OF_EPOCH in metrics:
            self.flush()
        self._row |= {"epoch": epoch, "step": step, **metrics}

    def flush(self) -> None:
        """Write the last row, too."""
        row, self._row = self._row, {}
        if row.keys() <= set(self._columns):
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self._columns, lineterminator="\n").writerows(
                    [row] if row else []
                )
        else:  # new columns
            self._columns = _write(self.path, [*_read(self.path), row])


def trim_metrics(run: Path, epochs: int, steps: int) -> None:
    """Remove what was logged after a run's last checkpoint; arguments as of `logger.trim_events`."""
    if rows := _read(run / METRICS):
        _write(run / METRICS, [row for row in rows if _kept(row, epochs, steps)])


def _kept(row: Mapping[str, str], epochs: int, steps: int) -> bool:
    try:
        return int(row["epoch"]) <= epochs if row.get(OF_EPOCH) else int(row["step"]) < steps
    except (ValueError, TypeError, KeyError):  # cut short, or somebody else's
        return False


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") if path.is_file() else StringIO() as file:
        return list(csv.DictReader(file))


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Write a whole table and give its columns."""
    columns = list(dict.fromkeys(chain.from_iterable(rows)))
    text = StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
    return columns
