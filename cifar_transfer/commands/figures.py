"""The figures of a run, drawn again from its files: `python -m cifar_transfer figures RUN`."""

from collections.abc import Sequence
from pathlib import Path
from zipfile import BadZipFile

import yaml
from jsonargparse import auto_cli

from cifar_transfer.base.errors import UserError, disk_fault, first_line
from cifar_transfer.base.files import CONFIG
from cifar_transfer.cli.parsers import Parser
from cifar_transfer.results.predictions import Predictions
from cifar_transfer.results.publish import FOLDER, curves, prediction_plots, save
from cifar_transfer.results.words import language, language_of


def figures(run: str) -> list[Path]:
    """Draw a run's figures again from its files: the curves so far, and the predictions of the test images.

    Args:
        run: Folder of the run.

    Raises:
        UserError: It is no run's folder, or a file of it is damaged.
    """
    folder = Path(run)
    if not (folder / CONFIG).is_file():
        raise UserError(
            f"There is no {folder / 'config.yaml'}: name a run's folder, say lightning_logs/version_0."
        )
    try:
        spoken = language_of(folder)
        with language(spoken):
            paths = save(curves(folder), folder / FOLDER)
        for kept in sorted(
            (folder / FOLDER).glob("*-*.npz")
        ):  # older runs call them answers-SPLIT.npz
            split = kept.stem.rpartition("-")[2]
            predictions = Predictions.load(kept)
            with language(spoken, predictions.names):
                paths += save(prediction_plots(predictions, split), folder / FOLDER)
    except (OSError, ValueError, KeyError, TypeError, BadZipFile, yaml.YAMLError) as error:
        if disk_fault(error):
            raise
        raise UserError(
            f"{folder} cannot be drawn because a file of it is damaged ({first_line(error)})."
        ) from None
    print("\n".join(map(str, paths)))
    return paths


def main(args: Sequence[str]) -> None:
    """Parse the options and draw."""
    auto_cli(figures, args=[*args], parser_class=Parser)
