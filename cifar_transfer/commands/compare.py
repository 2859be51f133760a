"""Several backbones under one recipe, or one backbone with several seeds.

    python -m cifar_transfer compare NAME[=WEIGHTS]... [--seeds N] [options of fit]

Each backbone is trained by a `fit` in a process of its own, one after another, with seed 0, then
with seed 1 and so on. The same command continues after a stop: it skips what is done, and tries
again what failed; more seeds add runs. All other options are those of `fit`, the same for every
backbone.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from cifar_transfer.base.errors import check
from cifar_transfer.base.files import LOGS, make_folder, user_path, write_json
from cifar_transfer.base.status_line import StatusLine
from cifar_transfer.base.text import markdown
from cifar_transfer.cli.fit_process import (
    finished_runs,
    fit_once,
    last_line,
    read_result,
    refuse_names_of_runs,
)
from cifar_transfer.cli.parsers import PartParser, config_options, refuse_seed
from cifar_transfer.cli.recipes import RECIPE_FILE, check_recipe, with_recipe_files
from cifar_transfer.network.contestant import Contestant, parse_contestants
from cifar_transfer.results.comparison import (
    FIGURE,
    ComparedNetwork,
    ComparedRun,
    short_table,
    write_comparison,
)
from cifar_transfer.results.intervals import MAX_SEEDS, number, seeds_note

OUT = Path(LOGS, "comparison")
LOG = "fit.log"  # in the folder of a network and a seed: what its run prints
PROGRESS_COLUMNS = ("seed", "val %", "test %", "minutes")


def main(args: Sequence[str]) -> int:
    """Compare the backbones that the options name.

    Returns:
        The exit status: 1 if a backbone failed, 130 after Ctrl-C, else 0.

    Raises:
        UserError: There is a mistake in the options.
    """
    parser = PartParser("compare")
    parser.add_argument(
        "backbones",
        nargs="+",
        metavar="NAME[=WEIGHTS]",
        help="A backbone, with a name or a file of weights if not those of the recipe; "
        "NAME=none trains from scratch, without frozen epochs.",
    )
    parser.add_config()
    parser.add_argument(
        "--out",
        type=user_path,
        default=OUT,
        metavar="FOLDER",
        help=f"Folder of the runs, tables and figure (default: {OUT}).",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        default=1,
        metavar="N",
        help="Runs of each backbone, with the seeds 0 to N - 1 (default: 1).",
    )
    options, other_options = parser.parse_known_args(with_recipe_files(args))
    fit_options = [*config_options(options), *other_options]
    check("--seeds", options.seeds, lambda n: 1 <= n <= MAX_SEEDS, f"1 to {MAX_SEEDS}")
    refuse_names_of_runs("compare", fit_options)
    refuse_seed("compare", fit_options)
    backbones = parse_contestants(options.backbones)
    try:
        networks = compare(backbones, options.seeds, fit_options, options.out)
    except KeyboardInterrupt:
        print("\nStopped; the same command continues.")
        return 130
    if options.seeds > 1:
        note = seeds_note(options.seeds, len(networks))
        print(f"\n{markdown(short_table(networks))}\n{note}", end="")
    print(f"\nlook at it  {options.out / FIGURE}, .md, .csv, .tex")
    any_failed = any(network.failures for network in networks)
    return int(any_failed)


def compare(
    backbones: Sequence[Contestant], num_seeds: int, fit_options: Sequence[str], out: Path
) -> list[ComparedNetwork]:
    """Fit each backbone with each seed, unless that is done. Write tables and figure after each.

    Args:
        backbones: The backbones to compare.
        num_seeds: Number of seeds, from 0. All backbones have their run with one seed before the
            first one has its run with the next, so that what is there is comparable at any time.
        fit_options: Options of `fit` for all of them.
        out: Folder of the runs, the tables and the figure.

    Raises:
        UserError: `out` is no folder, or holds results of another recipe.
    """
    make_folder(out, "--out")
    write_json(out / RECIPE_FILE, check_recipe(out, fit_options))
    width = max(len(backbone.label) for backbone in backbones)
    heading = "  ".join(f"{column:>7}" for column in PROGRESS_COLUMNS)
    print(f"What each run prints: {out / '*' / '*' / LOG}\n\n{'network':<{width}}  {heading}")

    runs: dict[str, list[ComparedRun]] = {backbone.label: [] for backbone in backbones}
    networks: list[ComparedNetwork] = []
    for seed in range(num_seeds):
        for backbone in backbones:
            run = _fit(backbone, seed, fit_options, out / backbone.folder)
            runs[backbone.label].append(run)
            print(f"{backbone.label:<{width}}  {_outcome(run)}", flush=True)
            networks = _networks(backbones, runs)
            write_comparison(networks, out)
    return networks


def _fit(
    backbone: Contestant, seed: int, fit_options: Sequence[str], network_folder: Path
) -> ComparedRun:
    """Fit a backbone with a seed, unless that is done, and say meanwhile how far it is."""
    recipe = check_recipe(
        network_folder, backbone.options
    )  # two files of weights may have one name
    folder = network_folder / f"seed_{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(network_folder / RECIPE_FILE, recipe)
    log = folder / LOG
    status_line = StatusLine()

    def watch(line: str) -> None:
        status_line.show(f"{backbone.label}, seed {seed}: {line}")

    options = [*fit_options, *backbone.options, f"--seed_everything={seed}"]
    status = fit_once(folder, options, log, watch)
    status_line.clear()
    finished = finished_runs(folder)
    if finished:
        return ComparedRun(seed, read_result(finished[0]))
    print(last_line(log), file=sys.stderr)
    return ComparedRun(seed, failure=f"failed with exit status {status}")


def _networks(
    backbones: Sequence[Contestant], runs: Mapping[str, Sequence[ComparedRun]]
) -> list[ComparedNetwork]:
    """Return the networks that have a run so far."""
    networks = []
    for backbone in backbones:
        if runs[backbone.label]:
            network = ComparedNetwork(
                backbone.name, backbone.label, backbone.scratch, list(runs[backbone.label])
            )
            networks.append(network)
    return networks


def _outcome(run: ComparedRun) -> str:
    """Return the line of a run, below `PROGRESS_COLUMNS`."""
    if run.failure:
        return f"{run.seed:>7}  {run.failure}"
    cells = (
        str(run.seed),
        number(run.validation_accuracy, 2),
        number(run.test_accuracy, 2),
        number(run.minutes, 1),
    )
    return "  ".join(f"{cell:>7}" for cell in cells)
