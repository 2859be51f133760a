"""What the `config.yaml` of a run may do when the run continues: it may be somebody else's."""

import re
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import set_parsing_settings
from lightning import Trainer

from cifar_transfer.base.errors import UserError
from cifar_transfer.base.files import CONFIG
from cifar_transfer.training.lightning_internals import callbacks_of, profiler_of


def import_nothing_else(args: Sequence[str]) -> None:
    """Let the configuration of a run name only known classes and those of the command line.

    It may be somebody else's, and to look up what a name stands for imports its module, which runs
    it. What `--config` names is the choice of the user, and may be any class. This holds for the
    rest of the process.

    Args:
        args: Options of the command line.
    """
    allowed = ["cifar_transfer", "lightning", "torchvision.transforms.v2"]
    for arg in args:
        value = arg.partition("=")[2] if arg.startswith("--") else arg
        if re.fullmatch(r"(?!jsonargparse\.)[^\W\d]\w*(\.[^\W\d]\w*)+", value):
            allowed.append(value)
    set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=allowed)


def check_places(trainer: Trainer, run: Path) -> None:
    """Refuse the configuration of a run that has files written elsewhere than among the runs.

    It may be somebody else's, and name any place.

    Args:
        trainer: Trainer made from the configuration.
        run: Folder of the run.

    Raises:
        UserError: A callback, a logger or the profiler would write elsewhere.
    """
    for writer in [*callbacks_of(trainer), *trainer.loggers, profiler_of(trainer)]:
        for attribute in ("dirpath", "log_dir"):
            place = getattr(writer, attribute, None)
            if place and not Path(place).resolve().is_relative_to(run.parent):
                raise UserError(
                    f"{run / CONFIG} has files written to {place}, outside of the run: take that "
                    f"out of it first."
                )
