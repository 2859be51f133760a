"""Features from a command line that names backbones and has the options of `fit` for all else."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lightning import Trainer

from cifar_transfer.base.errors import check
from cifar_transfer.base.files import require_writable
from cifar_transfer.cli.fit_cli import PlainCLI
from cifar_transfer.cli.parsers import PartParser
from cifar_transfer.data.splits import Split
from cifar_transfer.features.extract import FeatureExtractor, Features, features
from cifar_transfer.features.store import LIMIT_GB
from cifar_transfer.network.contestant import Contestant


class FeaturesCLI(PlainCLI):
    """The options of `fit`, and a Trainer that keeps nothing."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the Trainer; each feature is as precise as the extractor says, whatever a recipe for training has."""
        return super().instantiate_trainer(precision=None, **kwargs)


class Extracted(NamedTuple):
    """What `features_of` gives."""

    cli: FeaturesCLI
    extractor: FeatureExtractor
    found: dict[Split, Features]
    seconds: float  # that the features took


def parser(command: str, out: Path) -> PartParser:
    """What `probe` and `audit` have in common: `--config`, `--out`, `--features` and `--limit_gb`."""
    options = PartParser(command)
    options.add_argument(
        "--config", action="append", default=[], metavar="FILE", help="A recipe, as fit takes it."
    )
    options.add_argument(
        "--out", type=Path, default=out, metavar="FOLDER", help=f"Where to write (default: {out})."
    )
    kept = "Where features are kept (default: in the user's cache)."
    options.add_argument("--features", type=Path, metavar="FOLDER", help=kept)
    most = f"Most that it may hold, 1e9 bytes each (default: {LIMIT_GB:g}); those not used for longest go first."
    options.add_argument("--limit_gb", type=float, default=LIMIT_GB, metavar="GB", help=most)
    return options


def features_of(
    one: Contestant, options: argparse.Namespace, of_fit: Sequence[str], out: Path, views: int = 1
) -> Extracted:
    """The features of the data's images by a backbone.

    Args:
        one: The backbone and its weights.
        options: Of `parser`.
        of_fit: Options of `fit`.
        out: The folder to write to, which is seen to before features are computed, for that may take hours.
        views: Of each training image, see `FeatureExtractor`.

    Raises:
        UserError: A mistake in the options, the data or the weights, or a network whose head is no linear layer.
    """
    check("--limit_gb", options.limit_gb, lambda x: x > 0, "a positive number")
    recipes = [f"--config={file}" for file in options.config]
    cli = FeaturesCLI([*recipes, *of_fit, *one.options])
    extractor = FeatureExtractor(
        cli.model, cli.datamodule, options.features, views, options.limit_gb
    )
    require_writable(out, "--out")
    begun = time.monotonic()
    return Extracted(cli, extractor, features(cli.trainer, extractor), time.monotonic() - begun)
