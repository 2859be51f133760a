"""The likeliest classes of images.

    python -m cifar_transfer predict FILE|FOLDER|PATTERN|-... [--ckpt FILE]

An image that cannot be read is named on stderr and left out. The exit status is then 1.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import Namespace

from cifar_transfer.base.errors import UserError, check
from cifar_transfer.base.files import make_folder, user_path
from cifar_transfer.cli.parsers import Parser
from cifar_transfer.inference.named_images import (
    NamedImages,
    add_mirrored_option,
    add_options,
    check_output_file,
)
from cifar_transfer.inference.prediction_formats import FORMATS
from cifar_transfer.inference.sources import image_files


def main(args: Sequence[str]) -> int:
    """Print the classes of each image that the options name, and draw figures.

    Returns:
        The exit status: 1 if an image could not be read, else 0.

    Raises:
        UserError: A checkpoint or an option is unfit, or the network has no heat maps.
    """
    options = _parse(args)
    images = NamedImages(options, options.mirrored)
    predictions = images.predictions(options.top_k)
    if options.figure or options.explain:
        # Only here, because matplotlib takes a second to be imported.
        from cifar_transfer.inference.drawing import draw

        predictions = draw(predictions, images, options.figure, options.explain)
    predictions = images.with_progress(predictions, printed=True)
    as_text = FORMATS[options.format]
    for text in as_text(predictions, images.classifier.class_names, options.threshold):
        print(text, end="", flush=True)
    return int(images.num_unreadable > 0)


def _parse(args: Sequence[str]) -> Namespace:
    parser = Parser(prog="python -m cifar_transfer predict")
    parser.add_argument(
        "--top_k", type=int, default=5, help="How many classes to give for each image."
    )
    parser.add_argument(
        "--format", choices=list(FORMATS), default="table", help="Of what is printed."
    )
    parser.add_argument(
        "--threshold",
        type=float,
        metavar="P",
        help='Answer "unknown" where no class has this probability, from 0 to 1.',
    )
    parser.add_argument(
        "--figure",
        type=user_path,
        metavar="FILE.png",
        help="Draw the first 24 images with their classes.",
    )
    parser.add_argument(
        "--explain",
        type=user_path,
        metavar="FOLDER",
        help="Draw for each image where its class is seen (Grad-CAM).",
    )
    add_mirrored_option(parser)
    add_options(parser)
    options = parser.parse_args(list(args))
    if options.threshold is not None:
        check("--threshold", options.threshold, lambda p: 0 <= p <= 1, "a probability from 0 to 1")
    if options.figure:
        check_output_file("--figure", options.figure, ".png")
        _check_replaces_no_image(options.figure, options.images)
    if options.explain:
        make_folder(options.explain, "--explain")
    return options


def _check_replaces_no_image(figure: Path, names: Sequence[str]) -> None:
    """Refuse a figure that would be written over one of the named images.

    A list on standard input is not looked at, because it can be read only once.
    """
    if not figure.exists():
        return
    existing_names = [name for name in names if os.path.exists(name)]
    for image in image_files(existing_names, lambda error: None):
        if os.path.samefile(figure, image):
            raise UserError(
                f"--figure {figure} is one of the images, and would replace it: name another file."
            )
