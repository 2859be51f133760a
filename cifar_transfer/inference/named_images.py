"""What the commands that look at images share: which images, by which checkpoint, and what cannot be read."""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from jsonargparse import Namespace
from tqdm import tqdm

from cifar_transfer.base.errors import UserError
from cifar_transfer.cli.parsers import Parser
from cifar_transfer.data.images import MAX_MEGAPIXELS
from cifar_transfer.inference.predictor import Classifier
from cifar_transfer.inference.sources import find
from cifar_transfer.results.predictions import ImagePrediction
from cifar_transfer.training.checkpoint_file import newest_checkpoint


class NamedImages:
    """The images that a command line names, and the checkpoint that looks at them.

    Attributes:
        refused: How many could not be read; each is named on stderr.

    Raises:
        UserError: An unfit checkpoint or option.
    """

    def __init__(self, options: Namespace) -> None:
        if options.ckpt is None:
            options.ckpt = newest_checkpoint()
            print(f"The newest run's checkpoint: {options.ckpt}", file=sys.stderr)
        self.options, self.refused = options, 0
        self.classifier = Classifier.load(options.ckpt, options.accelerator, options.max_megapixels)

    def predictions(self, top_k: int) -> Iterator[ImagePrediction]:
        """As of `Classifier.stream`."""
        sources = find(self.options.images, self._refuse)
        return self.classifier.stream(sources, top_k, self.options.batch_size, self._refuse)

    def _refuse(self, error: UserError) -> None:
        self.refused += 1
        tqdm.write(f"error: {error}", file=sys.stderr)

    def shown(
        self, predictions: Iterable[ImagePrediction], printed: bool
    ) -> Iterator[ImagePrediction]:
        """Pass predictions on with a bar on the terminal, unless they are `printed` there, which is progress enough."""
        names = self.options.images
        hidden = not sys.stderr.isatty() or (printed and sys.stdout.isatty())
        total = None if hidden or "-" in names else sum(1 for _ in find(names, lambda error: None))
        yield from tqdm(predictions, total=total, unit=" images", delay=2, disable=hidden)


def add_options(parser: Parser) -> None:
    """Have a parser know the options of `NamedImages`."""
    add = parser.add_argument
    images = "Files, folders, patterns ('photos/**/*.jpg'); - reads them from standard input, one a line."
    add("images", nargs="+", metavar="IMAGE", help=images)
    add("--ckpt", help="Checkpoint; without, the best of the newest run in lightning_logs/.")
    add("--batch_size", type=int, default=64, help="Images that the network sees at once.")
    add("--accelerator", default="auto", help="auto takes a GPU where there is one; cpu, gpu.")
    add(
        "--max_megapixels",
        type=float,
        default=MAX_MEGAPIXELS,
        help="Larger images are refused before decoding.",
    )


def check_file(option: str, path: Path, *endings: str) -> None:
    """Refuse, by a `UserError`, a file to write that has another ending or no folder."""
    if path.suffix not in endings or not path.parent.is_dir() or path.is_dir():
        raise UserError(
            f"{option} {path}: name a file that ends in {' or '.join(endings)}, in a folder that exists."
        )
