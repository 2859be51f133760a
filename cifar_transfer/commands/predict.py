"""The likeliest classes of images: `python -m cifar_transfer predict FILE|FOLDER|PATTERN|-... [--ckpt FILE]`.

The exit status is 1 if an image could not be read; each such is named on stderr, and the others are classified.
"""

import csv
import io
import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from jsonargparse import Namespace

from cifar_transfer.base.errors import UserError
from cifar_transfer.base.files import make_folder
from cifar_transfer.base.text import printable
from cifar_transfer.cli.parsers import Parser
from cifar_transfer.inference.named_images import NamedImages, add_options, check_file
from cifar_transfer.inference.sources import find
from cifar_transfer.results.predictions import MAX_GALLERY_IMAGES, ImagePrediction

CONTROL = re.compile("[\x7f-\x9f]")  # characters that steer a terminal, and that JSON lets stand
FORMULA = (
    "=",
    "+",
    "-",
    "@",
)  # how one begins (https://owasp.org/www-community/attacks/CSV_Injection)
Format = Callable[[Iterable[ImagePrediction], Sequence[str]], Iterator[str]]


def table(predictions: Iterable[ImagePrediction], names: Sequence[str]) -> Iterator[str]:
    """Classes and probabilities in columns, as wide as the longest of all `names`; the file, of any length, is last."""
    shown = {name: printable(name) for name in names}
    wide = max(map(_cells, shown.values()))
    for prediction in predictions:
        classes = ((shown[name], share) for name, share in prediction.classes)
        columns = (f"{' ' * (wide - _cells(name))}{name} {share:6.1%}" for name, share in classes)
        yield "  ".join([*columns, f"{printable(str(prediction.source))}\n"])


def _cells(text: str) -> int:
    """How many columns of a terminal a text takes: Chinese letters two, accents none."""
    return sum(
        (1 + (unicodedata.east_asian_width(c) in "WF")) * (not unicodedata.combining(c))
        for c in text
    )


def as_json(predictions: Iterable[ImagePrediction], names: Sequence[str]) -> Iterator[str]:
    """One array, a line for each image: `{"image": FILE, "classes": [[NAME, PROBABILITY], ...]}`."""
    before, after = "[\n", "[]\n"
    for prediction in predictions:
        classes = [(name, round(share, 6)) for name, share in prediction.classes]
        line = json.dumps({"image": prediction.source, "classes": classes}, ensure_ascii=False)
        yield before + CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", line)
        before, after = ",\n", "\n]\n"
    yield after


def as_csv(predictions: Iterable[ImagePrediction], names: Sequence[str]) -> Iterator[str]:
    """A row for each class of each image, under a heading."""
    line = io.StringIO()
    writer = csv.writer(line, lineterminator="\n")
    writer.writerow(["image", "rank", "class", "probability"])
    for prediction in predictions:
        for rank, (name, share) in enumerate(prediction.classes, 1):
            writer.writerow([_cell(prediction.source), rank, _cell(name), f"{share:.6f}"])
        yield line.getvalue()
        line.seek(0)
        line.truncate()
    yield line.getvalue()


def _cell(text: str) -> str:
    """In one line, and with a quote before what a spreadsheet would take for a formula and execute."""
    line = printable(text)
    return f"'{line}" if line.startswith(FORMULA) else line


FORMATS: dict[str, Format] = {"table": table, "json": as_json, "csv": as_csv}


def main(args: Sequence[str]) -> int:
    """Classify what the options name and print it, image by image; draw what they ask for.

    Returns:
        The exit status: 1 if an image could not be read, else 0.

    Raises:
        UserError: An unfit checkpoint or option, or a network without heat maps.
    """
    options = _parse(args)
    images = NamedImages(options)
    classifier, predicted = images.classifier, 0
    first: list[ImagePrediction] = []

    def predictions() -> Iterator[ImagePrediction]:
        nonlocal predicted
        stream = images.predictions(options.top_k)
        if options.explain:
            from cifar_transfer.inference.explain import explained

            stream = explained(stream, classifier.model, options.explain)
        for prediction in images.shown(stream, printed=True):
            predicted += 1
            if predicted <= MAX_GALLERY_IMAGES:
                first.append(prediction)
            yield prediction

    with ExitStack() as drawing:
        if (
            options.figure or options.explain
        ):  # what draws is imported for it alone, because it takes a second
            from cifar_transfer.results.words import language, language_of

            drawing.enter_context(
                language(language_of(Path(options.ckpt).resolve().parent.parent), classifier.names)
            )
        for text in FORMATS[options.format](predictions(), classifier.names):
            print(text, end="", flush=True)
        if options.figure and first:
            from cifar_transfer.results import gallery, plots

            plots.save(gallery.gallery(first, predicted), options.figure)
    return int(images.refused > 0)


def _parse(args: Sequence[str]) -> Namespace:
    parser = Parser(prog="python -m cifar_transfer predict")
    add = parser.add_argument
    add("--top_k", type=int, default=5, help="How many classes to give for each image.")
    add("--format", choices=list(FORMATS), default="table", help="Of what is printed.")
    add(
        "--figure",
        type=Path,
        metavar="FILE.png",
        help="Draw the first 24 images with their classes.",
    )
    add(
        "--explain",
        type=Path,
        metavar="FOLDER",
        help="Draw for each image where its class is seen (Grad-CAM).",
    )
    add_options(parser)
    options = parser.parse_args(list(args))
    if options.figure:
        check_file("--figure", options.figure, ".png")
        there = options.figure.exists() and [
            name for name in options.images if os.path.exists(name)
        ]  # "-" is read later
        if there and any(
            os.path.samefile(options.figure, name) for name in find(there, lambda error: None)
        ):
            raise UserError(
                f"--figure {options.figure} is one of the images, and would replace it: name another file."
            )
    if options.explain:
        make_folder(options.explain, "--explain")
    return options
