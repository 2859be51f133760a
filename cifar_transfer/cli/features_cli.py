"""Features from a command line that names backbones and has the options of `fit` for all else."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from lightning import Trainer

from cifar_transfer.base.errors import check
from cifar_transfer.base.files import require_writable, user_path
from cifar_transfer.cli.fit_cli import PlainCLI
from cifar_transfer.cli.parsers import PartParser, config_options
from cifar_transfer.data.module import ImageDataModule
from cifar_transfer.data.splits import Split
from cifar_transfer.features.extract import FeatureExtractor, Features, extract_features
from cifar_transfer.features.store import DEFAULT_LIMIT_GB
from cifar_transfer.network.contestant import Contestant
from cifar_transfer.training import lightning_internals
from cifar_transfer.training.classifier import TransferClassifier


class Extraction(NamedTuple):
    """Features, and what they were extracted with.

    Attributes:
        trainer: Trainer whose processes are running.
        model: Network, with the geometry of the data.
        data: Images, set up.
        features: Features of each split.
        computed: Number of images whose features were not on disk.
        seconds: Time that the features took.
        rows_by_seed: Rows of other training and validation images by the seed that chooses them,
            see `ImageDataModule.rows_with_seed`.
    """

    trainer: Trainer
    model: TransferClassifier
    data: ImageDataModule
    features: dict[Split, Features]
    computed: int
    seconds: float
    rows_by_seed: dict[int, dict[Split, np.ndarray]]


def parser(command: str, out: Path) -> PartParser:
    """Return a parser of what `probe` and `audit` share.

    Args:
        command: Name of the command.
        out: Default folder of its results.
    """
    options = PartParser(command)
    options.add_config()
    options.add_argument(
        "--out",
        type=user_path,
        default=out,
        metavar="FOLDER",
        help=f"Where to write (default: {out}).",
    )
    options.add_argument(
        "--features",
        type=user_path,
        metavar="FOLDER",
        help="Where features are kept (default: in the user's cache).",
    )
    options.add_argument(
        "--limit_gb",
        type=float,
        default=DEFAULT_LIMIT_GB,
        metavar="GB",
        help=f"Most that it may hold, 1e9 bytes each (default: {DEFAULT_LIMIT_GB:g}); those not "
        f"used for longest go first.",
    )
    return options


def extract(
    backbone: Contestant,
    options: argparse.Namespace,
    fit_options: Sequence[str],
    out: Path,
    views: int = 1,
    other_seeds: Sequence[int] = (),
) -> Extraction:
    """Extract the features of the data's images by a backbone.

    Args:
        backbone: Backbone and its weights.
        options: Options of `parser`.
        fit_options: Options of `fit`.
        out: Folder to write to. It is checked before features are computed, which may take hours.
        views: Number of views of each training image, see `FeatureExtractor`.
        other_seeds: Seeds that choose other validation images. Any image may then be one of
            training, so that validation images have as many views.

    Raises:
        UserError: A mistake in the options, the data or the weights, a network whose head is no
            linear layer, or other seeds that choose no other images.
    """
    check("--limit_gb", options.limit_gb, lambda x: x > 0, "a positive number")
    cli = PlainCLI([*config_options(options), *fit_options, *backbone.options])
    trainer = cli.trainer
    model = cli.model
    data = cli.datamodule
    splits_with_views: list[Split] = ["train"]
    if other_seeds:
        splits_with_views.append("val")
    extractor = FeatureExtractor(
        model.classifier,
        data,
        options.features,
        views,
        options.limit_gb,
        splits_with_views=splits_with_views,
    )
    require_writable(out, "--out")

    rows_by_seed: dict[int, dict[Split, np.ndarray]] = {}

    def settle() -> None:
        """Have the network take up statistics and size of the images, and split them anew."""
        lightning_internals.attach(trainer, model, data)
        model.setup("test")
        for seed in other_seeds:
            rows_by_seed[seed] = data.rows_with_seed(seed)

    start = time.monotonic()
    with lightning_internals.without_requeued_state(trainer):
        features = extract_features(trainer, extractor, settle)
    seconds = time.monotonic() - start
    return Extraction(trainer, model, data, features, extractor.computed, seconds, rows_by_seed)
