"""A run that is killed, or told to stop, at the N-th time of a moment.

Arguments: `MOMENT N [options of fit]`.
"""

import io
import os
import signal
import sys

import torch

from cifar_transfer import TransferClassifier
from cifar_transfer.base import files
from cifar_transfer.cli.fit_cli import FitCLI
from cifar_transfer.commands.fit import fit
from cifar_transfer.data import cache
from cifar_transfer.training import metrics_logger, schedule
from cifar_transfer.training import run as runs


def at(owner, name, left, when=lambda *args: True, number=signal.SIGKILL):
    """Send this process a signal at the N-th call of `owner.name` with such arguments."""
    real = getattr(owner, name)

    def deadly(*args, **kwargs):
        nonlocal left
        left -= bool(when(*args))
        if left == 0:
            os.kill(os.getpid(), number)
        return real(*args, **kwargs)

    setattr(owner, name, deadly)


def half_written(left, name):
    """Kill this process when the N-th checkpoint of that name is on its way to the disk."""

    def save(checkpoint, file):
        nonlocal left
        whole = io.BytesIO()
        torch_save(checkpoint, whole)
        left -= name in file.name
        if left == 0:
            file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        file.write(whole.getvalue())

    torch_save, torch.save = torch.save, save


def moving(left, name):
    at(files.os, "replace", left, lambda source, target: str(target).endswith(name))


MOMENTS = {
    "start-up": lambda n: at(FitCLI, "before_instantiate_classes", n),
    "decoding": lambda n: at(cache.tqdm, "update", n),
    "writing the configuration": lambda n: moving(n, runs.CONFIG),
    "mid-step": lambda n: at(TransferClassifier, "optimizer_step", n),  # of any optimizer
    "Ctrl-C": lambda n: at(TransferClassifier, "optimizer_step", n, number=signal.SIGINT),
    "told to stop": lambda n: at(TransferClassifier, "optimizer_step", n, number=signal.SIGTERM),
    "half of best.ckpt": lambda n: half_written(n, "best.ckpt"),
    "half of last.ckpt": lambda n: half_written(n, "last.ckpt"),
    "moving last.ckpt": lambda n: moving(n, "last.ckpt"),
    "trimming the curves": lambda n: at(metrics_logger, "trim_metrics", n),
    "unfreezing": lambda n: at(schedule, "prepare_for_new_parameters", n),
    "validation": lambda n: at(
        TransferClassifier,
        "validation_step",
        n,
        lambda model, *_: not model.trainer.sanity_checking,
    ),
    "final test": lambda n: at(TransferClassifier, "test_step", n),
    "writing the result": lambda n: moving(n, "result.json"),
}

if __name__ == "__main__":
    MOMENTS[sys.argv[1]](int(sys.argv[2]))
    fit(sys.argv[3:])
