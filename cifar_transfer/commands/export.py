"""A trained network for other programs.

    python -m cifar_transfer export --ckpt FILE --to onnx

Weights alone (`state_dict`, `safetensors`) are those of the library's own network. A graph (`onnx`,
`torch_export`) needs none of this project's code and takes any number of images at once. Each file
is read back, and must give the logits of the checkpoint before it gets its name.
"""

import sys
from collections.abc import Sequence

from jsonargparse import auto_cli

from cifar_transfer.base.files import user_path
from cifar_transfer.cli.parsers import Parser
from cifar_transfer.inference.exporter import BATCH_SIZES, Exporter


def export(
    ckpt: str,
    to: str,
    out: str | None = None,
    preprocess: bool = True,
    mirrored: bool = False,
) -> float | None:
    """Write a checkpoint's network in another format, and read it back.

    Args:
        ckpt: The checkpoint.
        to: "state_dict" (the class names go beside it as JSON), "safetensors", "onnx", or
            "torch_export" for `torch.export.load`.
        out: The file; by default beside the checkpoint, under its name with .pth, .safetensors,
            .onnx or .pt2.
        preprocess: Put resizing and normalisation into the graph of onnx and torch_export, which
            then takes images as they are in [0, 1]; otherwise it takes what the network takes.
            Weights alone hold neither.
        mirrored: Have the graph look at each image and at its mirror image. What it gives are then
            logarithms of the mean of both probabilities, divided by the temperature, in twice the
            time.

    Returns:
        The largest absolute difference of a logit between the file and the checkpoint, or None if
        there is no onnxruntime to run the file.

    Raises:
        UserError: The checkpoint is unfit, a package is missing, the format cannot hold the
            network, or the file does not give the checkpoint's logits. It is then removed.
    """
    exporter = Exporter(user_path(ckpt), to, user_path(out) if out else None, preprocess, mirrored)
    print(f"Writing {exporter.path}, and trying it ...", file=sys.stderr)
    difference = exporter.export()
    megabytes = exporter.path.stat().st_size / 1e6
    print(f"file        {exporter.path} ({megabytes:.1f} MB)")
    print(f"input       {exporter.notes['input']}")
    if difference is None:
        print("difference  not known: pip install onnxruntime")
    else:
        batches = ", ".join(str(size) for size in BATCH_SIZES)
        print(f"difference  {difference:.1e} at most in any logit of batches of {batches}")
    return difference


def main(args: Sequence[str]) -> None:
    """Parse the options and export."""
    auto_cli(export, args=list(args), as_positional=False, parser_class=Parser)
