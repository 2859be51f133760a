"""Transfer learning in a minute or two, without data and network: `python -m cifar_transfer.demo`.

ResNet18 is pretrained on one task of drawn shapes; then another task, with 40 images a class, is learned from there
with the freeze schedule, and beside it from scratch. All three are ordinary runs of `fit`, with recipes of `configs/`.
"""

import sys
import time
from pathlib import Path

from cifar_transfer.errors import UserError, one_sentence
from cifar_transfer.fit import Outcome, fit

CONFIGS = Path("configs")


def run(name: str, *options: str) -> Outcome:
    """One run of `fit` with the recipe `configs/demo-NAME.yaml`.

    Raises:
        UserError: The recipes are not below the current folder.
    """
    config = CONFIGS / f"demo-{name}.yaml"
    if not config.is_file():
        raise UserError(f"{config} is not here: run the demo in the project's own folder.")
    print(f"\n--- {name} ---", flush=True)
    outcome = fit(["--config", str(config), *options, *sys.argv[1:]])
    assert outcome is not None
    return outcome


def main() -> None:
    """Pretrain, transfer, compare."""
    began = time.monotonic()
    upstream = run("upstream")
    accuracy = {
        "pretrained on other shapes, then 5 epochs frozen and 7 not": run(
            "transfer", f"--model.weights={upstream.best}"
        ),
        "from scratch, 12 epochs": run("scratch"),
    }
    print(f"\nTest accuracy on ten new shapes from 40 images each ({time.monotonic() - began:.0f} s in all):")
    for what, outcome in accuracy.items():
        print(f"  {outcome.figures['best/test_acc']:6.1%}  {what}")


if __name__ == "__main__":
    with one_sentence():
        main()
