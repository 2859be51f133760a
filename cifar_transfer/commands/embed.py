"""Features of images for other tools.

    python -m cifar_transfer embed IMAGE... --out FILE.npz

FILE.npz holds arrays: `names` of the images, `features`, float32 [N, D], what comes into the head,
and `predicted`, their classes. `--projector FOLDER` has TensorBoard show the images as points. An
image that cannot be read is named on stderr and left out. The exit status is then 1.
"""

from collections.abc import Sequence

from jsonargparse import Namespace

from cifar_transfer.base.errors import UserError
from cifar_transfer.base.files import require_writable, user_path
from cifar_transfer.cli.parsers import Parser
from cifar_transfer.inference.embeddings import MAX_PROJECTED_IMAGES, embed
from cifar_transfer.inference.named_images import NamedImages, add_options, check_output_file


def main(args: Sequence[str]) -> int:
    """Write the features of the images that the options name.

    Returns:
        The exit status: 1 if an image could not be read, else 0.

    Raises:
        UserError: A checkpoint or an option is unfit.
    """
    options = _parse(args)
    images = NamedImages(options)
    embeddings = embed(images, with_thumbnails=options.projector is not None)
    if embeddings is not None:
        embeddings.save(options.out)
        count, width = embeddings.features.shape
        print(f"{count:,} images, {width:,} features each: {options.out}", flush=True)
        if options.projector is not None:
            embeddings.save_projector(options.projector)
            print(f"look at it  tensorboard --logdir {options.projector}")
    return int(images.num_unreadable > 0)


def _parse(args: Sequence[str]) -> Namespace:
    parser = Parser(prog="python -m cifar_transfer embed")
    parser.add_argument(
        "--out", type=user_path, required=True, metavar="FILE.npz", help="Where the features go."
    )
    parser.add_argument(
        "--projector",
        type=user_path,
        metavar="FOLDER",
        help=f"A new folder, for TensorBoard's projector: the first {MAX_PROJECTED_IMAGES:,} "
        "images among their neighbours.",
    )
    add_options(parser)
    options = parser.parse_args(list(args))
    check_output_file("--out", options.out, ".npz")
    if options.projector is not None:
        require_writable(options.projector, "--projector")
        if options.projector.exists() or options.projector == options.out:
            raise UserError(f"--projector {options.projector} is there already: name a new folder.")
    return options
