"""What comes into the head for each image, for other tools: `python -m cifar_transfer.embed IMAGE... --out FILE`.

FILE.npz holds arrays: `names` of the images, `features`, float32 [N, D], and `predicted`, their classes; FILE.parquet
has them as columns. The exit status is 1 if an image could not be read; each such is named on stderr, and left out.
"""

from cifar_transfer import start

if __name__ == "__main__":
    start.run("embed")

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from cifar_transfer.errors import UserError
from cifar_transfer.files import atomic_write
from cifar_transfer.inference.images import NamedImages, add_options, check_file
from cifar_transfer.options import Parser
from cifar_transfer.text import printable


def main(args: Sequence[str]) -> int:
    """Write the features of the images that the options name.

    Returns:
        The exit status: 1 if an image could not be read, else 0.

    Raises:
        UserError: An unfit checkpoint or option, or a package that is missing.
    """
    parser = Parser(prog="python -m cifar_transfer.embed")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="FILE.npz or FILE.parquet.")
    add_options(parser)
    options = parser.parse_args(list(args))
    check_file("--out", options.out, ".npz", ".parquet")
    parquet = options.out.suffix == ".parquet"
    if parquet and find_spec("pyarrow") is None:
        raise UserError("A .parquet file needs pyarrow: pip install pyarrow, or name a file that ends in .npz.")
    images = NamedImages(options)
    with images.classifier.model.features() as seen:
        found = [(one.source, one.classes[0][0]) for one in images.shown(images.predictions(1), printed=False)]
    if found:
        names, predicted = map(list, zip(*found, strict=True))
        features = torch.cat(seen).numpy()
        with atomic_write(options.out) as file:
            if parquet:
                import pyarrow
                from pyarrow.parquet import write_table

                rows = pyarrow.FixedSizeListArray.from_arrays(features.ravel(), features.shape[1])
                columns = {"names": [printable(name) for name in names], "features": rows, "predicted": predicted}
                write_table(pyarrow.table(columns), file)
            else:
                np.savez(file, names=np.array(names), features=features, predicted=np.array(predicted))
        print(f"{len(names):,} images, {features.shape[1]:,} features each: {options.out}")
    return int(images.refused > 0)
