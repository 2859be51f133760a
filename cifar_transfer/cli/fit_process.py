"""`fit` in processes of its own, as `compare` and `demo` run it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cifar_transfer.base.errors import UserError
from cifar_transfer.base.files import CONFIG, LOGS, RESULT

SECONDS_BETWEEN_LOOKS = 1.0
SECONDS_TO_STOP = 60.0  # of a process that is told to
TAIL_BYTES = 4096  # of a log, in which its last line is

Watch = Callable[[str], None]


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


def run_fit(options: Sequence[str]) -> int:
    """Run `fit` in a process of its own, which prints here, and return its exit status."""
    return subprocess.run(_command(options), check=False).returncode


def run_watched_fit(options: Sequence[str], log: Path, watch: Watch) -> int:
    """Run `fit` in a process of its own that prints into a file, and return its exit status.

    Args:
        options: Options of `fit`.
        log: File to which everything that the process prints is appended.
        watch: Is called now and then with the last line of the file.

    Raises:
        KeyboardInterrupt: Ctrl-C. The process, which the terminal has told too, has ended.
    """
    with log.open("a") as file:
        process = subprocess.Popen(_command(options), stdout=file, stderr=subprocess.STDOUT)
    try:
        while True:
            try:
                return process.wait(SECONDS_BETWEEN_LOOKS)
            except subprocess.TimeoutExpired:
                watch(last_line(log))
    except BaseException:
        _end(process)
        raise


def _command(options: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "cifar_transfer.fit", *options]


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Wait for a process that is told to stop, and kill it if it does not."""
    try:
        process.wait(SECONDS_TO_STOP)
    except BaseException:  # also a second Ctrl-C
        process.kill()
        process.wait()


def last_line(log: Path) -> str:
    """Return the last line of a file that has letters, or ""."""
    with log.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TAIL_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    for line in reversed(lines):
        if line.strip():
            return line.strip()
    return ""


def fit_once(folder: Path, options: Sequence[str], log: Path, watch: Watch) -> int:
    """Fit in a folder, unless a finished run is there. A run that was stopped is continued.

    Args:
        folder: Folder of the runs; it exists.
        options: Options of `fit` for a new run.
        log: As for `run_watched_fit`.
        watch: As for `run_watched_fit`.

    Returns:
        The exit status; 0 if a finished run was there.
    """
    if finished_runs(folder):
        return 0
    stopped = all_runs(folder)
    if stopped:
        return run_watched_fit(["--resume", str(stopped[-1])], log, watch)
    return run_watched_fit([*options, f"--trainer.default_root_dir={folder}"], log, watch)


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
