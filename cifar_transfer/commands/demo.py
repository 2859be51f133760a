"""Transfer learning in a minute or two, without data and network: `python -m cifar_transfer demo`.

ResNet18 is pretrained on one task of drawn shapes; then another task, with 40 images a class, is learned from there
with the freeze schedule, and beside it from scratch. All three are runs of `fit`, which take its options and the
recipes demo-upstream, demo-transfer and demo-scratch.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cifar_transfer.base.errors import UserError
from cifar_transfer.base.files import LOGS, RESULT


def run(name: str, options: list[str]) -> dict[str, Any]:
    """What `result.json` says of a `fit` with the recipe `demo-NAME`, and its folder as "run".

    Raises:
        UserError: The run keeps no result.
        SystemExit: The run failed, and has said why.
    """
    if any(option.startswith("--trainer.fast_dev_run") for option in options):
        raise UserError("The demo compares runs, but fast_dev_run keeps none: leave it out.")
    root = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    root.add_argument("--trainer.default_root_dir", dest="folder", type=Path, default=Path())
    logs = root.parse_known_args(options)[0].folder / LOGS
    before = set(logs.glob(f"*/{RESULT}"))
    print(f"\n--- {name} ---", flush=True)
    command = [sys.executable, "-m", "cifar_transfer.fit", f"--config=demo-{name}", *options]
    if status := subprocess.run(command, check=False).returncode:
        sys.exit(status)
    found = sorted(set(logs.glob(f"*/{RESULT}")) - before, key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError(
            f"The {name} run has kept no result, so there is nothing to compare: leave {options} out."
        )
    return json.loads(found[-1].read_text()) | {"run": found[-1].parent}


def main(args: Sequence[str]) -> None:
    """Pretrain, transfer, compare."""
    began, options = time.monotonic(), [*args]
    upstream = run("upstream", options)["run"] / "checkpoints" / "best.ckpt"
    transfer = run("transfer", [f"--model.weights={upstream}", *options])
    scratch = run("scratch", options)
    print(
        f"\nTest accuracy on ten new shapes from 40 images each ({time.monotonic() - began:.0f} s in all):"
    )
    print(
        f"  {transfer['best/test_acc']:6.1%}  pretrained on other shapes, then 5 epochs frozen and 7 not"
    )
    print(f"  {scratch['best/test_acc']:6.1%}  from scratch, 12 epochs")
