"""Predictions for images as text: a table for people, JSON or CSV for programs.

Each function yields text as soon as there is a prediction, so that memory does not grow. With a
threshold it also says an answer for each image: its likeliest class, or "unknown" if that class has
a probability below the threshold. The classes and their probabilities stay.
"""

import csv
import io
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence

from cifar_transfer.base.text import printable, spreadsheet_cell
from cifar_transfer.results.predictions import UNKNOWN, ImagePrediction

# Characters that steer a terminal, and that JSON leaves as they are.
CONTROL_CHARACTERS = re.compile("[\x7f-\x9f]")
Format = Callable[[Iterable[ImagePrediction], Sequence[str], float | None], Iterator[str]]


def as_table(
    predictions: Iterable[ImagePrediction],
    class_names: Sequence[str],
    threshold: float | None = None,
) -> Iterator[str]:
    """Yield a line for each image: classes with probabilities in columns, then the image.

    The answer comes first, if there is a threshold.

    Args:
        predictions: Predictions.
        class_names: Names of all classes. The columns are as wide as the longest.
        threshold: Probability below which the answer is "unknown", or None for no answers.
    """
    shown_names = {name: printable(name) for name in class_names}
    width = max(_terminal_columns(name) for name in shown_names.values())
    answer_width = max(width, len(UNKNOWN))
    for prediction in predictions:
        columns = []
        if threshold is not None:
            columns.append(_right_aligned(printable(prediction.answer(threshold)), answer_width))
        for name, share in prediction.classes:
            columns.append(f"{_right_aligned(shown_names[name], width)} {share:6.1%}")
        columns.append(printable(str(prediction.source)))
        yield "  ".join(columns) + "\n"


def _right_aligned(text: str, width: int) -> str:
    """Return a text with blanks before it, as wide as `width` columns of a terminal."""
    return " " * (width - _terminal_columns(text)) + text


def _terminal_columns(text: str) -> int:
    """Return how many columns of a terminal a text takes: Chinese letters two, accents none."""
    columns = 0
    for character in text:
        if unicodedata.combining(character):
            continue
        is_wide = unicodedata.east_asian_width(character) in "WF"
        columns += 2 if is_wide else 1
    return columns


def as_json(
    predictions: Iterable[ImagePrediction],
    class_names: Sequence[str],
    threshold: float | None = None,
) -> Iterator[str]:
    """Yield one array with a line for each image.

    A line is `{"image": FILE, "classes": [[NAME, PROBABILITY], ...]}`; with a threshold it also has
    `"answer": NAME`.
    """
    is_first = True
    for prediction in predictions:
        classes = [(name, round(share, 6)) for name, share in prediction.classes]
        content = {"image": prediction.source, "classes": classes}
        if threshold is not None:
            content["answer"] = prediction.answer(threshold)
        line = json.dumps(content, ensure_ascii=False)
        line = CONTROL_CHARACTERS.sub(_json_escape, line)
        yield f"[\n{line}" if is_first else f",\n{line}"
        is_first = False
    yield "[]\n" if is_first else "\n]\n"


def _json_escape(match: re.Match[str]) -> str:
    return f"\\u{ord(match[0]):04x}"


def as_csv(
    predictions: Iterable[ImagePrediction],
    class_names: Sequence[str],
    threshold: float | None = None,
) -> Iterator[str]:
    """Yield a heading, and a row for each image: its file, its likeliest class, the probability.

    Then follow the other classes, `label_2` and `probability_2` and so on, and with a threshold the
    `answer`. The first two columns are those of a table to train on, see `TableDataModule`.
    """
    is_first = True
    for prediction in predictions:
        if is_first:
            yield _csv_line(_heading(len(prediction.classes), threshold))
            is_first = False
        cells = [spreadsheet_cell(prediction.source)]
        for name, share in prediction.classes:
            cells += [spreadsheet_cell(name), f"{share:.6f}"]
        if threshold is not None:
            cells.append(spreadsheet_cell(prediction.answer(threshold)))
        yield _csv_line(cells)
    if is_first:
        yield _csv_line(_heading(1, threshold))


def _heading(num_classes: int, threshold: float | None) -> list[str]:
    """Return the names of the columns for predictions of so many classes."""
    columns = ["image", "label", "probability"]
    for rank in range(2, num_classes + 1):
        columns += [f"label_{rank}", f"probability_{rank}"]
    if threshold is not None:
        columns.append("answer")
    return columns


def _csv_line(cells: Sequence[str]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue()


FORMATS: dict[str, Format] = {"table": as_table, "json": as_json, "csv": as_csv}
