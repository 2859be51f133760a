"""What the frozen features of backbones tell of the classes.

    python -m cifar_transfer probe NAME[=WEIGHTS]... [options of fit]

The features of each backbone are computed once and kept. Logistic regression, nearest neighbours,
nearest class means and few-shot heads are fitted on them. The best logistic regression becomes a
checkpoint for `predict`, `evaluate` and `export`. Fine-tuning can go on from it (Kumar et al. 2022,
https://arxiv.org/abs/2202.10054), with the same options of model and data:
`fit --model.weights=CHECKPOINT --freeze.unfreeze_epoch=0 --model.lr=1e-4`.

All other options are those of fit, for example `--data.root=photos --model.image_size=128`.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from cifar_transfer.base.errors import UserError, check
from cifar_transfer.base.files import LOGS, RESULT, write_json
from cifar_transfer.base.text import markdown
from cifar_transfer.cli.features_cli import Extraction, extract, parser
from cifar_transfer.cli.recipes import RECIPE_FILE, check_recipe
from cifar_transfer.features.heads import evaluate_heads
from cifar_transfer.features.logistic import LinearHead
from cifar_transfer.features.new_head import sample_images, set_head
from cifar_transfer.network.contestant import Contestant, parse_contestants
from cifar_transfer.results import probe_table
from cifar_transfer.results.calibration import Calibration, calibrate
from cifar_transfer.results.probe_table import ProbeResult
from cifar_transfer.training import lightning_internals
from cifar_transfer.training.run_checkpoints import AtomicCheckpointIO

DEFAULT_FOLDER = Path(LOGS, "probe")
MAX_VIEWS = 100
CHECKPOINT = Path("checkpoints", "best.ckpt")  # in the folder of a backbone


def main(args: Sequence[str]) -> int:
    """Parse the options, probe each backbone, print the table; return 1 if one failed."""
    options, fit_options = _parse(args)
    backbones = parse_contestants(options.backbones)
    configs = [f"--config={file}" for file in options.config]
    recipe = check_recipe(options.out, [f"--views={options.views}", *configs, *fit_options])
    for backbone in backbones:  # two files of weights may have the same name
        check_recipe(options.out / backbone.folder, backbone.options)
    results = _earlier_results(options.out)
    failed_labels: list[str] = []
    for number, backbone in enumerate(backbones, 1):
        rank_zero_info(f"{number}/{len(backbones)} {backbone.label}")
        results.pop(backbone.folder, None)
        try:
            results[backbone.folder] = probe(backbone, options, fit_options)
        except UserError as error:
            if len(backbones) == 1:
                raise
            rank_zero_info(f"error: {backbone.label}: {error}")
            failed_labels.append(backbone.label)
        _write(results, failed_labels, options.out, recipe)
    _print(results, failed_labels, options.out)
    return int(bool(failed_labels))


def _parse(args: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the options of this command, and those of `fit`."""
    options_parser = parser("probe", DEFAULT_FOLDER)
    options_parser.add_argument(
        "backbones",
        nargs="+",
        metavar="NAME[=WEIGHTS]",
        help="A backbone, with a name or a file of weights if not those of its library.",
    )
    options_parser.add_argument(
        "--views",
        type=int,
        default=1,
        metavar="N",
        help="Views of each training image: 1 itself, 2 also mirrored, each further one augmented "
        "(default: 1).",
    )
    options, fit_options = options_parser.parse_known_args(args)
    check("--views", options.views, lambda n: 1 <= n <= MAX_VIEWS, f"1 to {MAX_VIEWS}")
    return options, fit_options


def _earlier_results(folder: Path) -> dict[str, ProbeResult]:
    """Return results of the same recipe by the folder of their backbone."""
    results = {}
    if (folder / RECIPE_FILE).is_file():
        for path in sorted(folder.glob(f"*/{RESULT}")):
            results[path.parent.name] = probe_table.read_result(path)
    return results


def probe(
    backbone: Contestant, options: argparse.Namespace, fit_options: Sequence[str]
) -> ProbeResult:
    """Fit heads on the features of a backbone, and save the network with the best one.

    Args:
        backbone: Backbone and its weights.
        options: Options of this command. Checkpoint and result go into a folder in `out`.
        fit_options: Options of `fit`.

    Returns:
        The result, the same in all processes.

    Raises:
        UserError: See `extract`, or the network does more with the logits of its head.
    """
    folder = options.out / backbone.folder
    extraction = extract(backbone, options, fit_options, folder, options.views)
    trainer = extraction.trainer
    data = extraction.data
    fitted: Any = None  # in the other processes, until the first one sends it
    if trainer.is_global_zero:
        fitted = _fit_heads(backbone.label, extraction)
    head, calibration, result = trainer.strategy.broadcast(fitted)
    classifier = extraction.model.classifier
    set_head(classifier, head, sample_images(data))
    classifier.set_temperature(calibration.temperature)
    rank_zero_info(f"temperature {calibration}")
    trainer.strategy.checkpoint_io = AtomicCheckpointIO()
    if trainer.is_global_zero:
        folder.mkdir(parents=True, exist_ok=True)
        data.record_splits(folder)
    lightning_internals.save_attached(trainer, extraction.model, folder / CHECKPOINT)
    if trainer.is_global_zero:
        probe_table.write_result(folder / RESULT, result)
        write_json(folder / RECIPE_FILE, check_recipe(folder, backbone.options))
    return result


def _fit_heads(label: str, extraction: Extraction) -> tuple[LinearHead, Calibration, ProbeResult]:
    """Return the best head, its temperature, and the scores of all."""
    start = time.monotonic()
    head, scores = evaluate_heads(extraction.features, extraction.data.num_classes)
    result = ProbeResult(
        label=label,
        precision=extraction.trainer.precision,
        computed=extraction.computed,
        feature_seconds=extraction.seconds,
        head_seconds=time.monotonic() - start,
        **scores._asdict(),
    )
    val = extraction.features["val"]
    calibration = calibrate(
        head.logits(val), torch.from_numpy(val.labels), extraction.data.validates_on_test_images
    )
    return head, calibration, result


@rank_zero_only
def _write(
    results: dict[str, ProbeResult],
    failed_labels: Sequence[str],
    folder: Path,
    recipe: dict[str, Any],
) -> None:
    """Write the tables, the figure and the recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RECIPE_FILE, recipe)
    probe_table.write_tables(list(results.values()), failed_labels, folder)


@rank_zero_only
def _print(results: dict[str, ProbeResult], failed_labels: Sequence[str], folder: Path) -> None:
    """Print a short table, and where the files are."""
    table = probe_table.short_table(list(results.values()), failed_labels)
    print(f"\n{markdown(table)}")
    print(f"all of it   {folder / probe_table.TABLE}, {folder / probe_table.FIGURE}")
    for name in results:
        print(f"checkpoint  {folder / name / CHECKPOINT}")
