"""Records: what README and the recipes claim, measured with several seeds.

    python -m benchmarks.records                  # write records/README.md from what is there
    python -m benchmarks.records fast [--seeds N] [--images FOLDER] [--weights FOLDER]

The second form runs the command of a record with each of the seeds that it has no result of, in an
empty folder, in which `images` and `weights` are the folders given. A record is a folder::

    records/NAME/record.yaml                    what is measured, see `Record`
    records/NAME/seed_0/measured.json           command, wall time, load of the machine before it
    records/NAME/seed_0/log.txt                 all that the command printed
    records/NAME/seed_0/lightning_logs/**/result.json    of each run of `fit` that it made

Whatever cites a record has to use its words, see `Record.claim`; tests/test_records.py holds it to
them.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from cifar_transfer.base.files import LOGS, RESULT, write_json
from cifar_transfer.base.machine import cores
from cifar_transfer.base.text import markdown
from cifar_transfer.results.intervals import mean_interval

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "records"
DESCRIPTION = "record.yaml"
LOG = "log.txt"
MEASURED = "measured.json"
TABLE = "README.md"
SCORE = "best/test_acc"
INTRODUCTION = """# Records

What [README](../README.md), the [recipes](../docs/recipes.md) and their files claim, as it was
measured: for each seed the log, and the `result.json` of each run with its versions and its
processor. This page is written by `python -m benchmarks.records`, which also measures, and
`tests/test_records.py` compares what is claimed with what is here.

"""
NOTES = """
The accuracy is the mean over the seeds 0, 1 and so on, with the lowest and the highest; the
interval is Student's. The minutes are those of the whole command, start, test and figures included.

"""


@dataclass(frozen=True)
class Record:
    """A claim: a command, and what it came to with each seed.

    Attributes:
        folder: Folder of the record, `records/NAME`.
        title: What is measured, in a few words.
        command: The command after `cifar-transfer`, without the seed.
        results: Folder of each run whose test accuracy counts, in the command's log folder, by what
            it is called.
        prepare: A module with its arguments that makes the images first, such as
            "benchmarks.drawn_photographs images"; "" if there is nothing to do.
        note: What else a reader has to know, such as where images and weights are from.
        claimed_in: Files that cite the accuracy of a run, relative to the project, by its name in
            `results`.
    """

    folder: Path
    title: str
    command: str
    results: dict[str, str]
    prepare: str = ""
    note: str = ""
    claimed_in: dict[str, list[str]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the record."""
        return self.folder.name

    @property
    def seed_folders(self) -> list[Path]:
        """Folders of the seeds that are measured, in their order."""
        folders = [path.parent for path in self.folder.glob(f"seed_*/{MEASURED}")]
        return sorted(folders, key=_seed_of)

    def outcomes(self, result: str) -> list[dict[str, Any]]:
        """Return the `result.json` of a run for each seed.

        Args:
            result: What the run is called in `results`.
        """
        outcomes = []
        for folder in self.seed_folders:
            path = folder / LOGS / self.results[result] / RESULT
            outcomes.append(json.loads(path.read_text()))
        return outcomes

    def accuracies(self, result: str) -> list[float]:
        """Return the test accuracy in percent of a run for each seed."""
        return [100 * outcome[SCORE] for outcome in self.outcomes(result)]

    def minutes(self) -> list[float]:
        """Return the minutes that the whole command took for each seed."""
        measured = [json.loads((path / MEASURED).read_text()) for path in self.seed_folders]
        return [run["seconds"] / 60 for run in measured]

    def claim(self, result: str) -> str:
        """Return a run's accuracy as it is cited, such as "81.2 % (80.9 to 81.5, 5 seeds)"."""
        values = self.accuracies(result)
        mean = sum(values) / len(values)
        if len(values) == 1:
            return f"{mean:.1f} % (one seed)"
        return f"{mean:.1f} % ({min(values):.1f} to {max(values):.1f}, {len(values)} seeds)"

    def machines(self) -> list[str]:
        """Return the processors or GPUs on which the seeds were measured, each once."""
        names = []
        for result in self.results:
            for outcome in self.outcomes(result):
                names.append(outcome["device"])
        return sorted(set(names))


def read_record(folder: Path) -> Record:
    """Return the record in a folder.

    Raises:
        SystemExit: There is none.
    """
    path = folder / DESCRIPTION
    if not path.is_file():
        names = ", ".join(record.name for record in all_records(folder.parent))
        sys.exit(f"There is no record {folder.name}: take one of {names}.")
    return Record(folder, **yaml.safe_load(path.read_text()))


def all_records(folder: Path = RECORDS) -> list[Record]:
    """Return all records of a folder by their names."""
    paths = sorted(folder.glob(f"*/{DESCRIPTION}"))
    return [read_record(path.parent) for path in paths]


def _seed_of(folder: Path) -> int:
    return int(folder.name.removeprefix("seed_"))


def measure(record: Record, seed: int, links: Mapping[str, Path]) -> float:
    """Run the command of a record with a seed, keep what it leaves, and return its minutes.

    Args:
        record: The record.
        seed: Seed of the run.
        links: Folders that are there under a name, so that no path of this machine gets into the
            command.

    Raises:
        SystemExit: The command failed.
    """
    command = f"{record.command} --seed_everything={seed}"
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name, target in links.items():
            (folder / name).symlink_to(target.resolve())
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        if record.prepare:
            module = [sys.executable, "-m", *shlex.split(record.prepare)]
            subprocess.run(module, cwd=folder, env=environment, check=True)
        load = os.getloadavg()[0]
        start = time.monotonic()
        with (folder / LOG).open("w") as log:
            status = subprocess.run(
                [sys.executable, "-m", "cifar_transfer", *shlex.split(command)],
                cwd=folder,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            ).returncode
        seconds = time.monotonic() - start
        if status != 0:
            sys.exit(f"{command}\n{(folder / LOG).read_text()}")
        seed_folder = record.folder / f"seed_{seed}"
        seed_folder.mkdir()
        shutil.copy(folder / LOG, seed_folder / LOG)
        for path in folder.glob(f"{LOGS}/**/{RESULT}"):
            kept = seed_folder / path.relative_to(folder)
            kept.parent.mkdir(parents=True)
            shutil.copy(path, kept)
    measured = {
        "command": f"cifar-transfer {command}",
        "seconds": round(seconds, 1),
        "cores": cores(),
        "load_before": round(load, 2),
    }
    write_json(seed_folder / MEASURED, measured)
    return seconds / 60


def page(records: Sequence[Record]) -> str:
    """Return the text of records/README.md."""
    rows = [["record", "test accuracy", "95 % interval of the mean", "minutes", "measured on"]]
    details = []
    for record in records:
        if not record.seed_folders:
            continue
        minutes = record.minutes()
        for result in record.results:
            title = f"[{record.name}]({record.name}/)"
            if len(record.results) > 1:
                title = f"{title}, {result}"
            row = [
                title,
                record.claim(result),
                mean_interval(record.accuracies(result)).text(1),
                f"{min(minutes):.1f} to {max(minutes):.1f}",
                ", ".join(record.machines()),
            ]
            rows.append(row)
        details.append(f"- **{record.name}**: {record.title}. {record.note}\n")
        details.append(f"  `cifar-transfer {record.command}`\n")
    return INTRODUCTION + markdown(rows) + NOTES + "".join(details)


def main(args: Sequence[str]) -> None:
    """Measure what is missing of the records named, and write the table of all."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("records", nargs="*", help="Records to measure.")
    parser.add_argument("--seeds", type=int, default=5, help="Seeds 0 to N - 1 (default: 5).")
    parser.add_argument("--images", type=Path, help="Folder that the command calls images.")
    parser.add_argument("--weights", type=Path, help="Folder that the command calls weights.")
    parser.add_argument(
        "--folder",
        type=Path,
        default=RECORDS,
        help="Folder of the records (default: the project's).",
    )
    options = parser.parse_args(args)
    links = {}
    for name in ("images", "weights"):
        if getattr(options, name) is not None:
            links[name] = getattr(options, name)
    for name in options.records:
        record = read_record(options.folder / name)
        for seed in range(options.seeds):
            if record.folder / f"seed_{seed}" not in record.seed_folders:
                minutes = measure(record, seed, links)
                print(f"{name}, seed {seed}: done after {minutes:.1f} minutes")
    text = page(all_records(options.folder))
    (options.folder / TABLE).write_text(text)
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
