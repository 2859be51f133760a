"""What comes into the head for each image, for other tools: `python -m cifar_transfer embed IMAGE... --out FILE`.

FILE.npz holds arrays: `names` of the images, `features`, float32 [N, D], and `predicted`, their classes; FILE.parquet
has them as columns. `--projector FOLDER` has TensorBoard show the images as points. The exit status is 1 if an image
could not be read; each such is named on stderr, and left out.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cifar_transfer.base.errors import UserError
from cifar_transfer.base.files import atomic_write, require_writable
from cifar_transfer.base.text import printable
from cifar_transfer.cli.parsers import Parser
from cifar_transfer.inference.named_images import NamedImages, add_options, check_file
from cifar_transfer.results.thumbnails import MAX_SPRITE_SIDE, sprites, thumbnails

PROJECTED = 10_000  # images, the first ones; the projector itself draws no more of them
HEADER = ["class", "image"]  # of what the projector tells of a point; the first is told beside it


def main(args: Sequence[str]) -> int:
    """Write the features of the images that the options name.

    Returns:
        The exit status: 1 if an image could not be read, else 0.

    Raises:
        UserError: An unfit checkpoint or option, or a package that is missing.
    """
    parser = Parser(prog="python -m cifar_transfer embed")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="FILE.npz or FILE.parquet."
    )
    projector = f"A new folder, for TensorBoard's projector: the first {PROJECTED:,} images among their neighbours."
    parser.add_argument("--projector", type=Path, metavar="FOLDER", help=projector)
    add_options(parser)
    options = parser.parse_args(list(args))
    check_file("--out", options.out, ".npz", ".parquet")
    if options.projector:
        require_writable(options.projector, "--projector")
        if options.projector.exists() or options.projector == options.out:
            raise UserError(f"--projector {options.projector} is there already: name a new folder.")
    if options.out.suffix == ".parquet" and find_spec("pyarrow") is None:
        raise UserError(
            "A .parquet file needs pyarrow: pip install pyarrow, or name a file that ends in .npz."
        )
    images = NamedImages(options)
    found, pixels = list[tuple[str, str]](), list[Tensor]()
    with images.classifier.model.features() as seen:
        for one in images.shown(images.predictions(1), printed=False):
            found.append((one.source, one.classes[0][0]))
            if options.projector and len(found) <= PROJECTED:
                pixels.append(thumbnails(torch.from_numpy(one.pixels)[None], MAX_SPRITE_SIDE))
    if found:
        features = torch.cat(seen).numpy()
        _save(options.out, features, found)
        print(
            f"{len(found):,} images, {features.shape[1]:,} features each: {options.out}", flush=True
        )
        if options.projector:
            from torch.utils.tensorboard import SummaryWriter  # which takes seconds

            texts = [[predicted, printable(name)] for name, predicted in found[:PROJECTED]]
            with SummaryWriter(str(options.projector)) as board:
                shown = sprites(torch.cat(pixels))
                board.add_embedding(
                    features[:PROJECTED], texts, shown, tag="features", metadata_header=HEADER
                )
            print(f"look at it  tensorboard --logdir {options.projector}")
    return int(images.refused > 0)


def _save(path: Path, features: np.ndarray, found: Sequence[tuple[str, str]]) -> None:
    names, predicted = map(list, zip(*found, strict=True))
    with atomic_write(path) as file:
        if path.suffix == ".npz":
            np.savez(file, names=np.array(names), features=features, predicted=np.array(predicted))
            return
        import pyarrow
        from pyarrow.parquet import write_table

        rows = pyarrow.FixedSizeListArray.from_arrays(features.ravel(), features.shape[1])
        columns = {
            "names": [printable(name) for name in names],
            "features": rows,
            "predicted": predicted,
        }
        write_table(pyarrow.table(columns), file)
