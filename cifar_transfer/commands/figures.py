"""Figures of a run, drawn again from its files.

    python -m cifar_transfer figures RUN

These are the curves, even while the run goes on, and the predictions that it has kept.
"""

from collections.abc import Sequence
from pathlib import Path
from zipfile import BadZipFile

import yaml
from jsonargparse import auto_cli

from cifar_transfer.base.errors import UserError, disk_fault, first_line
from cifar_transfer.base.files import CONFIG, user_path
from cifar_transfer.cli.parsers import Parser
from cifar_transfer.results.predictions import FIGURES_FOLDER, Predictions, predictions_path
from cifar_transfer.results.run_figures import prediction_figures, save_figures
from cifar_transfer.results.words import language, language_of
from cifar_transfer.training.final_report import draw_curves


def figures(run: str) -> list[Path]:
    """Draw a run's figures again from its files: the curves so far, and the predictions.

    Args:
        run: Folder of the run.

    Returns:
        The files.

    Raises:
        UserError: The folder is not that of a run, or a file in it is damaged.
    """
    folder = user_path(run)
    config = folder / CONFIG
    if not config.is_file():
        raise UserError(f"There is no {config}: name a run's folder, say lightning_logs/version_0.")
    try:
        paths = _draw(folder)
    except (OSError, ValueError, KeyError, TypeError, BadZipFile, yaml.YAMLError) as error:
        if disk_fault(error):
            raise
        raise UserError(
            f"{folder} cannot be drawn because a file of it is damaged ({first_line(error)})."
        ) from None
    for path in paths:
        print(path)
    return paths


def _draw(run: Path) -> list[Path]:
    folder = run / FIGURES_FOLDER
    name = language_of(run)
    with language(name):
        paths = save_figures(draw_curves(run), folder)
    for split in ("test", "val"):
        file = predictions_path(run, split)
        if file.is_file():
            predictions = Predictions.load(file)
            with language(name, predictions.names):
                paths += save_figures(prediction_figures(predictions, split), folder)
    return paths


def main(args: Sequence[str]) -> None:
    """Parse the options and draw."""
    auto_cli(figures, args=[*args], parser_class=Parser)
