"""A job that tests start: `python ddp_exit_job.py END [options of fit]`.

Each rank writes which threads of gloo remain.
"""

import os
import signal
import sys
from pathlib import Path

import torch

from cifar_transfer import TransferClassifier
from cifar_transfer.base.errors import one_sentence
from cifar_transfer.commands.fit import fit


def main(end, *options):
    real = TransferClassifier.training_step

    def step(model, batch, batch_idx):
        if end == "stop" and model.global_step == 2 and model.global_rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(model, batch, batch_idx) * (
            torch.nan if end == "error" and model.global_step == 2 else 1
        )

    TransferClassifier.training_step = step
    try:
        with one_sentence():
            fit(options)
    finally:
        threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
        Path(f"threads{os.environ.get('LOCAL_RANK', 0)}").write_text(
            " ".join(t for t in threads if "gloo" in t)
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
