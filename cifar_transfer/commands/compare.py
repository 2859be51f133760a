"""Several backbones under one recipe.

    python -m cifar_transfer compare NAME[=WEIGHTS]... [options of fit]

Each backbone is trained by a `fit` in a process of its own, one after another. The same command
continues after a stop: it skips what is done, and tries again what failed. All other options are
those of `fit`, the same for every backbone.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from cifar_transfer.base.files import LOGS, make_folder, user_path, write_json
from cifar_transfer.cli.fit_process import (
    finished_runs,
    fit_once,
    read_result,
    refuse_names_of_runs,
)
from cifar_transfer.cli.parsers import PartParser
from cifar_transfer.cli.recipes import RECIPE_FILE, check_recipe, with_recipe_files
from cifar_transfer.network.contestant import Contestant, parse_contestants
from cifar_transfer.results.comparison import FIGURE, ComparedNetwork, number, write_comparison

OUT = Path(LOGS, "comparison")
LOG = "fit.log"  # in a network's folder: what its runs print
PROGRESS_COLUMNS = ("val %", "test %", "minutes")


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
    parser.add_argument(
        "--config", action="append", default=[], metavar="FILE", help="A recipe, as fit takes it."
    )
    parser.add_argument(
        "--out",
        type=user_path,
        default=OUT,
        metavar="FOLDER",
        help=f"Folder of the runs, tables and figure (default: {OUT}).",
    )
    options, fit_options = parser.parse_known_args(with_recipe_files(args))
    refuse_names_of_runs("compare", fit_options)
    recipes = [f"--config={file}" for file in options.config]
    try:
        networks = compare(
            parse_contestants(options.backbones), [*recipes, *fit_options], options.out
        )
    except KeyboardInterrupt:
        print("\nStopped; the same command continues.")
        return 130
    print(f"\nlook at it  {options.out / FIGURE}, .md, .csv")
    any_failed = any(network.failure for network in networks)
    return int(any_failed)


def compare(
    backbones: Sequence[Contestant], fit_options: Sequence[str], out: Path
) -> list[ComparedNetwork]:
    """Fit each backbone that is not done yet. Write the tables and the figure after each.

    Args:
        backbones: The backbones to compare.
        fit_options: Options of `fit` for all of them.
        out: Folder of the runs, the tables and the figure.

    Raises:
        UserError: `out` is no folder, or holds results of another recipe.
    """
    make_folder(out, "--out")
    write_json(out / RECIPE_FILE, check_recipe(out, fit_options))
    width = max(len(backbone.label) for backbone in backbones)
    heading = "  ".join(f"{column:>7}" for column in PROGRESS_COLUMNS)
    print(f"What each run prints: {out / '*' / LOG}\n\n{'network':<{width}}  {heading}")

    networks: list[ComparedNetwork] = []
    for backbone in backbones:
        folder = out / backbone.folder
        recipe = check_recipe(folder, backbone.options)  # two files of weights may have one name
        folder.mkdir(exist_ok=True)
        write_json(folder / RECIPE_FILE, recipe)
        print(f"{backbone.label:<{width}}", end="", flush=True)
        network = _fit(backbone, fit_options, folder)
        _print_outcome(network, folder / LOG)
        networks.append(network)
        write_comparison(networks, out)
    return networks


def _fit(backbone: Contestant, fit_options: Sequence[str], folder: Path) -> ComparedNetwork:
    status = fit_once(folder, [*fit_options, *backbone.options], folder / LOG)
    finished = finished_runs(folder)
    result = read_result(finished[0]) if finished else {}
    failure = "" if finished else f"failed with exit status {status}"
    return ComparedNetwork(backbone.name, backbone.label, backbone.scratch, result, failure)


def _print_outcome(network: ComparedNetwork, log: Path) -> None:
    if network.failure:
        print(f"  {network.failure}", flush=True)
        last_lines = log.read_text(errors="replace").splitlines()[-1:]
        print(*last_lines, file=sys.stderr)
        return
    cells = (
        number(network.validation_accuracy, 2),
        number(network.test_accuracy, 2),
        number(network.minutes, 1),
    )
    print("", *(f"{cell:>7}" for cell in cells), sep="  ", flush=True)
