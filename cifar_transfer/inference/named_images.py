"""What `predict` and `embed` share: the images that a command line names, and their checkpoint."""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from jsonargparse import Namespace
from tqdm import tqdm

from cifar_transfer.base.errors import UserError
from cifar_transfer.base.files import user_path
from cifar_transfer.cli.parsers import Parser
from cifar_transfer.data.images import MAX_MEGAPIXELS
from cifar_transfer.data.left_aside import LeftAside
from cifar_transfer.inference.predictor import Classifier
from cifar_transfer.inference.sources import image_files
from cifar_transfer.results.predictions import ImagePrediction
from cifar_transfer.training.checkpoint_file import newest_checkpoint


def add_options(parser: Parser) -> None:
    """Add the options of `NamedImages` to a parser."""
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="Files, folders, patterns ('photos/**/*.jpg'); "
        "- reads them from standard input, one a line.",
    )
    parser.add_argument(
        "--batch_size", type=int, default=64, help="Images that the network sees at once."
    )
    add_classifier_options(parser)


def add_classifier_options(parser: Parser) -> None:
    """Add the options of `Classifier.load` to a parser."""
    parser.add_argument(
        "--ckpt", help="Checkpoint; without, the best of the newest run in lightning_logs/."
    )
    parser.add_argument(
        "--accelerator", default="auto", help="auto takes a GPU where there is one; cpu, gpu."
    )
    parser.add_argument(
        "--max_megapixels",
        type=float,
        default=MAX_MEGAPIXELS,
        help="Larger images are refused before decoding.",
    )


def add_mirrored_option(parser: Parser) -> None:
    """Add the option of those commands that predict."""
    parser.add_argument(
        "--mirrored",
        type=bool,
        default=False,
        help="Predict from each image and its mirror image together, in twice the time.",
    )


def load_classifier(ckpt: Path, options: Namespace, mirrored: bool) -> Classifier:
    """Load the classifier of a checkpoint with the options of `add_classifier_options`."""
    return Classifier.load(ckpt, options.accelerator, options.max_megapixels, mirrored)


class NamedImages:
    """The images that a command line names, and the classifier that looks at them.

    Args:
        options: Options of `add_options`.
        mirrored: Predict from each image and its mirror image together.

    Attributes:
        ckpt: The checkpoint.
        classifier: The classifier of the checkpoint.
        num_predicted: How many images were predicted so far.
        num_unreadable: How many could not be read so far. Each is named on stderr.

    Raises:
        UserError: The checkpoint or an option is unfit.
    """

    def __init__(self, options: Namespace, mirrored: bool = False) -> None:
        if options.ckpt is None:
            self.ckpt = newest_checkpoint()
            print(f"The newest run's checkpoint: {self.ckpt}", file=sys.stderr)
        else:
            self.ckpt = user_path(options.ckpt)
        self.classifier = load_classifier(self.ckpt, options, mirrored)
        self.num_predicted = 0
        self.num_unreadable = 0
        self._names = options.images
        self._batch_size = options.batch_size

    def predictions(self, top_k: int) -> Iterator[ImagePrediction]:
        """Yield a prediction for each image that can be read, with up to `top_k` classes."""
        left_aside = LeftAside()
        files = image_files(self._names, self._report, left_aside)
        for prediction in self.classifier.stream(files, top_k, self._batch_size, self._report):
            self.num_predicted += 1
            yield prediction
        text = left_aside.text()
        if text is not None:
            tqdm.write(text, file=sys.stderr)

    def _report(self, error: UserError) -> None:
        self.num_unreadable += 1
        tqdm.write(f"error: {error}", file=sys.stderr)

    def with_progress(
        self, predictions: Iterable[ImagePrediction], printed: bool
    ) -> Iterator[ImagePrediction]:
        """Yield predictions with a progress bar on stderr, if that is a terminal.

        Args:
            predictions: The predictions.
            printed: Whether they are printed. On a terminal that is progress enough.
        """
        hidden = not sys.stderr.isatty() or (printed and sys.stdout.isatty())
        total = None if hidden else self._count()
        yield from tqdm(predictions, total=total, unit=" images", delay=2, disable=hidden)

    def _count(self) -> int | None:
        """Return the number of named files; None if they are listed on standard input."""
        if "-" in self._names:
            return None
        return sum(1 for _ in image_files(self._names, lambda error: None))


def check_output_file(option: str, path: Path, ending: str) -> None:
    """Refuse a file to write that has another ending, or whose folder does not exist.

    Args:
        option: The option that names the file.
        path: The file.
        ending: The ending that it must have, such as ".png".

    Raises:
        UserError: The file is refused.
    """
    if path.suffix != ending or not path.parent.is_dir() or path.is_dir():
        raise UserError(
            f"{option} {path}: name a file that ends in {ending}, in a folder that exists."
        )
