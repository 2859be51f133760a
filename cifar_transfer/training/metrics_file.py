"""`metrics.csv`: the curves of a run, for those who plot themselves."""

import csv
from collections.abc import Iterable, Mapping
from io import StringIO
from pathlib import Path
from typing import Any

from cifar_transfer.base.files import write_text
from cifar_transfer.results.run_metrics import METRICS, TRAINABLE_FIGURE, read_rows


class MetricsFile:
    """Write a row for each step and each epoch that is logged; rows that are in the file stay.

    Args:
        run: Folder of the run.
    """

    def __init__(self, run: Path) -> None:
        self.path = run / METRICS
        self._columns: list[str] = []
        for row in read_rows(self.path):
            self._columns = list(row)
            break
        self._row: dict[str, Any] = {}  # not written yet

    def add(self, epoch: int | None, step: int | None, metrics: Mapping[str, float]) -> None:
        """Add what is logged at a step. Calls for the same step go into one row, until `flush`."""
        if step != self._row.get("step") or TRAINABLE_FIGURE in metrics:
            self.flush()
        self._row.update({"epoch": epoch, "step": step})
        self._row.update(metrics)

    def flush(self) -> None:
        """Write the last row."""
        row = self._row
        self._row = {}
        if not row:
            return
        if not row.keys() <= set(self._columns):  # a figure that no row has had so far
            rows = [*read_rows(self.path), row]
            self._columns = _columns(rows)
            _write(self.path, self._columns, rows)
            return
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self._columns, lineterminator="\n").writerow(row)


def trim_metrics(run: Path, epochs: int, steps: int) -> None:
    """Remove what a run has logged after its last checkpoint, because it will be logged again.

    Args:
        run: Folder of the run.
        epochs: Epochs that are not trained again.
        steps: Steps of the optimizer that are not made again.
    """
    path = run / METRICS
    rows = read_rows(path)
    if not rows:
        return
    kept_rows = [row for row in rows if _is_before(row, epochs, steps)]
    _write(path, _columns(kept_rows), kept_rows)


def _is_before(row: Mapping[str, str], epochs: int, steps: int) -> bool:
    """Return whether a row was logged before the checkpoint; False if it is damaged."""
    try:
        if row.get(TRAINABLE_FIGURE):
            return int(row["epoch"]) <= epochs
        return int(row["step"]) < steps
    except (ValueError, TypeError, KeyError):
        return False


def _columns(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    columns: dict[str, None] = {}  # in the order in which they appear
    for row in rows:
        columns.update(dict.fromkeys(row))
    return list(columns)


def _write(path: Path, columns: list[str], rows: Iterable[Mapping[str, Any]]) -> None:
    text = StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
