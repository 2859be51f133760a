"""Transfer learning in a minute or two, without data and network.

    python -m cifar_transfer demo [options of fit]

ResNet18 is pretrained on one task of drawn shapes. Then it learns another task, with 40 images a
class, once from these weights with the freeze schedule and once from scratch. All three are runs of
`fit` with the recipes demo-upstream, demo-transfer and demo-scratch, and take its options. They lie
in lightning_logs/demo/version_N, where no other command looks by itself.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from cifar_transfer.base.errors import UserError
from cifar_transfer.base.files import LOGS, RESULT, new_versions, user_path
from cifar_transfer.cli.fit_process import read_result, refuse_names_of_runs, run_fit

DEMO = "demo"  # folder of the runs, in `LOGS`


def main(args: Sequence[str]) -> None:
    """Pretrain, transfer, train from scratch, and print both accuracies.

    Raises:
        UserError: The options keep a run from having a result, or name it.
        SystemExit: A run failed, and has said why.
    """
    if any(arg.startswith("--trainer.fast_dev_run") for arg in args):
        raise UserError("The demo compares runs, but fast_dev_run keeps none: leave it out.")
    refuse_names_of_runs("demo", args)
    start = time.monotonic()
    folder = next(new_versions(_root(args) / LOGS / DEMO))
    upstream = _fit("upstream", folder, args)
    weights = upstream / "checkpoints" / "best.ckpt"
    transfer = _fit("transfer", folder, [f"--model.weights={weights}", *args])
    scratch = _fit("scratch", folder, args)
    seconds = time.monotonic() - start
    transfer_accuracy = read_result(transfer)["best/test_acc"]
    scratch_accuracy = read_result(scratch)["best/test_acc"]
    print(f"\nTest accuracy on ten new shapes from 40 images each ({seconds:.0f} s in all):")
    print(f"  {transfer_accuracy:6.1%}  pretrained on other shapes, then 5 epochs frozen and 7 not")
    print(f"  {scratch_accuracy:6.1%}  from scratch, 12 epochs")


def _root(options: Sequence[str]) -> Path:
    """Return the folder that holds the folder of the runs."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--trainer.default_root_dir", dest="root", type=user_path, default=Path())
    root: Path = parser.parse_known_args(options)[0].root
    return root


def _fit(name: str, folder: Path, options: Sequence[str]) -> Path:
    """Run `fit` with the recipe `demo-NAME` in a folder, and return the folder of the run."""
    print(f"\n--- {name} ---", flush=True)
    run = f"--run={DEMO}/{folder.name}/{name}"
    status = run_fit([f"--config=demo-{name}", run, *options])
    if status != 0:
        sys.exit(status)
    if not (folder / name / RESULT).is_file():
        raise UserError(
            f"The {name} run has kept no result, so there is nothing to compare: "
            f"leave {list(options)} out."
        )
    return folder / name
