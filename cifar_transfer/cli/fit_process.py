"""`fit` in processes of its own, as `compare` and `demo` run it."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cifar_transfer.base.errors import UserError
from cifar_transfer.base.files import CONFIG, LOGS, RESULT


def refuse_names_of_runs(command: str, options: Sequence[str]) -> None:
    """Refuse options of `fit` that name the folder of a run.

    Args:
        command: Name of the command that runs `fit` several times.
        options: Its options.

    Raises:
        UserError: They name one.
    """
    if any(option.partition("=")[0] == "--run" for option in options):
        raise UserError(f"{command} names the folders of its runs itself: leave --run out.")


def run_fit(options: Sequence[str], log: Path | None = None) -> int:
    """Run `fit` in a process of its own, and return its exit status.

    Args:
        options: Options of `fit`.
        log: File to which everything that the process prints is appended; None prints it here.
    """
    command = [sys.executable, "-m", "cifar_transfer.fit", *options]
    if log is None:
        return subprocess.run(command, check=False).returncode
    with log.open("a") as file:
        return subprocess.run(
            command, check=False, stdout=file, stderr=subprocess.STDOUT
        ).returncode


def fit_once(folder: Path, options: Sequence[str], log: Path) -> int:
    """Fit in a folder, unless a finished run is there. A run that was stopped is continued.

    Args:
        folder: Folder of the runs; it exists.
        options: Options of `fit` for a new run.
        log: As for `run_fit`.

    Returns:
        The exit status; 0 if a finished run was there.
    """
    if finished_runs(folder):
        return 0
    stopped = all_runs(folder)
    if stopped:
        return run_fit(["--resume", str(stopped[-1])], log)
    return run_fit([*options, f"--trainer.default_root_dir={folder}"], log)


def all_runs(folder: Path) -> list[Path]:
    """Return the runs in the `lightning_logs` of a folder, the oldest first."""
    configs = sorted((folder / LOGS).glob(f"*/{CONFIG}"), key=lambda path: path.stat().st_mtime)
    return [path.parent for path in configs]


def finished_runs(folder: Path) -> list[Path]:
    """Return the runs of `all_runs` that have a result, the oldest first."""
    return [run for run in all_runs(folder) if (run / RESULT).is_file()]


def read_result(run: Path) -> dict[str, Any]:
    """Return what the `result.json` of a finished run says."""
    result: dict[str, Any] = json.loads((run / RESULT).read_text())
    return result
