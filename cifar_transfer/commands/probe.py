"""What the frozen features of backbones tell of the classes.

    python -m cifar_transfer probe NAME[=WEIGHTS]... [options of fit]

The features of each backbone are computed once and kept, also for several seeds, each of which
chooses other validation images. Logistic regression, nearest neighbours, nearest class means and
few-shot heads are fitted on them. The best logistic regression becomes a checkpoint for `predict`,
`evaluate` and `export`. Fine-tuning can go on from it (Kumar et al. 2022,
https://arxiv.org/abs/2202.10054), with the same options of model and data:
`fit --model.weights=CHECKPOINT --freeze.unfreeze_epoch=0 --model.lr=1e-4`.

All other options are those of fit, for example `--data.root=photos --model.image_size=128`.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from cifar_transfer.base.errors import UserError, check
from cifar_transfer.base.files import LOGS, RESULT, write_json
from cifar_transfer.base.text import markdown
from cifar_transfer.cli.features_cli import Extraction, extract, parser
from cifar_transfer.cli.parsers import config_options, refuse_seed
from cifar_transfer.cli.recipes import RECIPE_FILE, check_recipe
from cifar_transfer.data.splits import Split
from cifar_transfer.features.extract import Features, split_anew
from cifar_transfer.features.heads import evaluate_heads
from cifar_transfer.features.logistic import LinearHead
from cifar_transfer.features.new_head import sample_images, set_head
from cifar_transfer.network.contestant import Contestant, parse_contestants
from cifar_transfer.results import probe_table
from cifar_transfer.results.calibration import Calibration, calibrate
from cifar_transfer.results.intervals import MAX_SEEDS, number
from cifar_transfer.results.probe_result import (
    VALIDATION,
    ProbedNetwork,
    ProbeResult,
    read_network,
    write_network,
)
from cifar_transfer.training import lightning_internals
from cifar_transfer.training.run_checkpoints import AtomicCheckpointIO

DEFAULT_FOLDER = Path(LOGS, "probe")
MAX_VIEWS = 100
CHECKPOINT = Path("checkpoints", "best.ckpt")  # in the folder of a backbone


def main(args: Sequence[str]) -> int:
    """Parse the options, probe each backbone, print the table; return 1 if one failed."""
    options, fit_options = _parse(args)
    backbones = parse_contestants(options.backbones)
    configs = config_options(options)
    recipe = check_recipe(options.out, [f"--views={options.views}", *configs, *fit_options])
    for backbone in backbones:  # two files of weights may have the same name
        check_recipe(options.out / backbone.folder, backbone.options)
    networks = _earlier_networks(options.out)
    failed_labels: list[str] = []
    for place, backbone in enumerate(backbones, 1):
        rank_zero_info(f"{place}/{len(backbones)} {backbone.label}")
        networks.pop(backbone.folder, None)
        try:
            networks[backbone.folder] = probe(backbone, options, fit_options)
        except UserError as error:
            if len(backbones) == 1:
                raise
            rank_zero_info(f"error: {backbone.label}: {error}")
            failed_labels.append(backbone.label)
        _write(networks, failed_labels, options.out, recipe)
    _print(networks, failed_labels, options.out)
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
    options_parser.add_argument(
        "--seeds",
        type=int,
        default=1,
        metavar="N",
        help="Choices of validation images, with the seeds 0 to N - 1, for each of which heads are "
        "fitted on the same features (default: 1).",
    )
    options, fit_options = options_parser.parse_known_args(args)
    check("--views", options.views, lambda n: 1 <= n <= MAX_VIEWS, f"1 to {MAX_VIEWS}")
    check("--seeds", options.seeds, lambda n: 1 <= n <= MAX_SEEDS, f"1 to {MAX_SEEDS}")
    if options.seeds > 1:
        refuse_seed("probe", fit_options)
    return options, fit_options


def _earlier_networks(folder: Path) -> dict[str, ProbedNetwork]:
    """Return results of the same recipe by the folder of their backbone."""
    networks = {}
    if (folder / RECIPE_FILE).is_file():
        for path in sorted(folder.glob(f"*/{RESULT}")):
            networks[path.parent.name] = read_network(path)
    return networks


def probe(
    backbone: Contestant, options: argparse.Namespace, fit_options: Sequence[str]
) -> ProbedNetwork:
    """Fit heads on the features of a backbone, and save the network with the best one.

    Args:
        backbone: Backbone and its weights.
        options: Options of this command. Checkpoint and result go into a folder in `out`; the
            checkpoint is that of the first seed.
        fit_options: Options of `fit`.

    Returns:
        The results of all seeds, the same in all processes.

    Raises:
        UserError: See `extract`, or the network does more with the logits of its head.
    """
    folder = options.out / backbone.folder
    other_seeds = range(1, options.seeds)
    if other_seeds:
        fit_options = [*fit_options, "--seed_everything=0"]
    extraction = extract(backbone, options, fit_options, folder, options.views, other_seeds)
    trainer = extraction.trainer
    data = extraction.data
    fitted: Any = None  # in the other processes, until the first one sends it
    if trainer.is_global_zero:
        fitted = _fit_heads(backbone.label, extraction)
    head, calibration, network = trainer.strategy.broadcast(fitted)
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
        write_network(folder / RESULT, network)
        write_json(folder / RECIPE_FILE, check_recipe(folder, backbone.options))
    return network


def _fit_heads(label: str, extraction: Extraction) -> tuple[LinearHead, Calibration, ProbedNetwork]:
    """Return the best head of the first seed, its temperature, and the scores of all heads."""
    data = extraction.data
    features = extraction.features
    head, first = _fit_heads_of_seed(label, extraction, features, data.seed)
    val = features["val"]
    calibration = calibrate(
        head.logits(val), torch.from_numpy(val.labels), data.validates_on_test_images
    )
    results = [first]
    for seed, rows in extraction.rows_by_seed.items():
        _, result = _fit_heads_of_seed(label, extraction, split_anew(features, rows), seed)
        # The features were computed for the first seed.
        results.append(replace(result, computed=0, feature_seconds=0.0))
    return head, calibration, ProbedNetwork(results)


def _fit_heads_of_seed(
    label: str, extraction: Extraction, features: dict[Split, Features], seed: int
) -> tuple[LinearHead, ProbeResult]:
    """Return the best head of the images that a seed has chosen, and the scores of all heads."""
    start = time.monotonic()
    head, scores = evaluate_heads(features, extraction.data.num_classes, seed)
    result = ProbeResult(
        label=label,
        seed=seed,
        precision=extraction.trainer.precision,
        computed=extraction.computed,
        feature_seconds=extraction.seconds,
        head_seconds=time.monotonic() - start,
        **scores._asdict(),
    )
    if extraction.rows_by_seed:
        rank_zero_info(f"seed {seed}: {number(result.accuracies[VALIDATION], 2)} % of validation")
    return head, result


@rank_zero_only
def _write(
    networks: dict[str, ProbedNetwork],
    failed_labels: Sequence[str],
    folder: Path,
    recipe: dict[str, Any],
) -> None:
    """Write the tables, the figure and the recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RECIPE_FILE, recipe)
    probe_table.write_tables(list(networks.values()), failed_labels, folder)


@rank_zero_only
def _print(networks: dict[str, ProbedNetwork], failed_labels: Sequence[str], folder: Path) -> None:
    """Print a short table, and where the files are."""
    shown = list(networks.values())
    print(f"\n{markdown(probe_table.short_table(shown, failed_labels))}")
    if probe_table.have_seeds(shown):
        print(probe_table.note(shown))
    print(f"all of it   {folder / probe_table.TABLE}, {folder / probe_table.FIGURE}")
    for name in networks:
        print(f"checkpoint  {folder / name / CHECKPOINT}")
