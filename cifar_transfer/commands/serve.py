"""A page that classifies the images dropped on it.

    python -m cifar_transfer serve [--ckpt FILE] [--port 7860]

The page shows the likeliest classes and where in the image the network sees the first of them.
Files are read as `predict` reads them.
"""

from collections.abc import Sequence
from contextlib import suppress

from cifar_transfer.base.errors import check
from cifar_transfer.base.files import user_path
from cifar_transfer.cli.parsers import Parser
from cifar_transfer.inference.named_images import (
    add_classifier_options,
    add_mirrored_option,
    load_classifier,
)
from cifar_transfer.inference.page import Page
from cifar_transfer.training.checkpoint_file import newest_checkpoint

MAX_PORT = 2**16 - 1


def main(args: Sequence[str]) -> None:
    """Show the page until Ctrl-C.

    Raises:
        UserError: A checkpoint or an option is unfit, or the port is taken.
    """
    parser = Parser(prog="python -m cifar_transfer serve")
    parser.add_argument(
        "--port", type=int, default=7860, help="Of the page; 0 takes any that is free."
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="Where to listen; 0.0.0.0 lets in whoever can reach this machine.",
    )
    add_mirrored_option(parser)
    add_classifier_options(parser)
    options = parser.parse_args(list(args))
    check("port", options.port, lambda port: 0 <= port <= MAX_PORT, f"0 to {MAX_PORT}")
    ckpt = user_path(options.ckpt or newest_checkpoint())
    classifier = load_classifier(ckpt, options, options.mirrored)
    with Page(ckpt, classifier, options.host, options.port) as server:
        print(f"{server.url} shows what {ckpt} sees. Ctrl-C ends it.", flush=True)
        with suppress(KeyboardInterrupt):
            server.serve_forever()
