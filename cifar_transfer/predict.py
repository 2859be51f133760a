"""The likeliest classes of images: `python -m cifar_transfer.predict IMAGE... --ckpt FILE [--json]`."""

import json

import torch
from jsonargparse import ArgumentParser

from cifar_transfer import checkpoints
from cifar_transfer.data import to_float
from cifar_transfer.errors import UserError, one_sentence
from cifar_transfer.images import read_image

Prediction = tuple[str, float]


def predict(images: list[str], ckpt: str, top_k: int = 5) -> dict[str, list[Prediction]]:
    """Classify image files.

    Args:
        images: Files of any size and mode; each is brought to the size of the images that the network was trained on.
        ckpt: A checkpoint of `fit`.
        top_k: How many classes to give for each image.

    Returns:
        For each file the likeliest classes with their probabilities in [0, 1], the likeliest first.

    Raises:
        UserError: A file that is no image, or an unfit checkpoint.
    """
    if top_k < 1:
        raise UserError(f"top_k is {top_k}: take 1 or more.")
    model = checkpoints.load(ckpt)
    names = model.hparams["class_names"] or [str(label) for label in range(model.hparams["num_classes"])]
    size = min(model.input_size or [32])
    predictions = {}
    for path in images:
        with torch.inference_mode():
            probabilities = model(to_float(torch.from_numpy(read_image(path, size)))[None]).softmax(dim=1)[0]
        best = probabilities.topk(min(top_k, len(names)))
        predictions[path] = [(names[i], p) for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
    return predictions


def table(predictions: dict[str, list[Prediction]]) -> str:
    """A line for each image: its name, then classes and probabilities in columns."""
    wide = max(map(len, predictions))
    column = max(len(name) for row in predictions.values() for name, _ in row)
    return "\n".join(
        f"{path:{wide}}  " + "  ".join(f"{name:>{column}} {p:6.1%}" for name, p in row)
        for path, row in predictions.items()
    )


def main() -> None:
    """Parse the options, predict and print."""
    parser = ArgumentParser(prog="python -m cifar_transfer.predict", description="The likeliest classes of images.")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="Image files.")
    parser.add_argument(
        "--ckpt", required=True, help="Checkpoint of a run, say lightning_logs/version_0/checkpoints/best.ckpt."
    )
    parser.add_argument("--top_k", type=int, default=5, help="How many classes to show.")
    parser.add_argument("--json", action="store_true", help="Print JSON: {image: [[class, probability], ...]}.")
    options = parser.parse_args()
    predictions = predict(options.images, options.ckpt, options.top_k)
    print(json.dumps(predictions, ensure_ascii=False, indent=1) if options.json else table(predictions))


if __name__ == "__main__":
    with one_sentence():
        main()
