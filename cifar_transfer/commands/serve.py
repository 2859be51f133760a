"""A page that classifies the images dropped on it: `python -m cifar_transfer serve [--ckpt FILE] [--port 7860]`."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from cifar_transfer.base.errors import check
from cifar_transfer.cli.parsers import Parser
from cifar_transfer.data.images import MAX_MEGAPIXELS
from cifar_transfer.inference.page import Page
from cifar_transfer.inference.predictor import Classifier
from cifar_transfer.training.checkpoint_file import newest_checkpoint


def main(args: Sequence[str]) -> None:
    """Show the page until Ctrl-C.

    Raises:
        UserError: An unfit checkpoint or option, or a port that is taken.
    """
    parser = Parser(prog="python -m cifar_transfer serve")
    add = parser.add_argument
    add("--ckpt", help="Checkpoint; without, the best of the newest run in lightning_logs/.")
    add("--port", type=int, default=7860, help="Of the page; 0 takes any that is free.")
    add(
        "--host",
        default="127.0.0.1",
        help="Where to listen; 0.0.0.0 lets in whoever can reach this machine.",
    )
    add("--accelerator", default="auto", help="auto takes a GPU where there is one; cpu, gpu.")
    add(
        "--max_megapixels",
        type=float,
        default=MAX_MEGAPIXELS,
        help="Larger images are refused before decoding.",
    )
    options = parser.parse_args(list(args))
    check("port", options.port, lambda port: 0 <= port < 2**16, "0 to 65535")
    ckpt = Path(options.ckpt or newest_checkpoint())
    classifier = Classifier.load(ckpt, options.accelerator, options.max_megapixels)
    with Page(ckpt, classifier, options.host, options.port) as server:
        print(f"{server.url} shows what {ckpt} sees. Ctrl-C ends it.", flush=True)
        with suppress(KeyboardInterrupt):
            server.serve_forever()
