"""The table, the rows of epochs and the figure of `benchmarks.peers`, from runs that are known."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.peer_job import PeerJob, Phase
from benchmarks.peer_runs import PEERS, PeerRun, by_peer, speeds_of
from cifar_transfer.base.machine import device_name, versions
from cifar_transfer.base.text import markdown

# How each contestant differs from the others.
NOTES = {
    "fit": "Adam, the head alone and then everything at a tenth of the rate; the images are "
    "decoded once, and after the training it tests and draws",
    "fast": "AdamW at a rate that falls from step to step, the head at three times the rate; no "
    "frozen phase; else as `fit`",
    "lightning": "AdamW, the head alone, then the backbone too at a tenth of the rate",
    "fastai": "Adam (decoupled weight decay) with one-cycle rates, lower towards the stem; a head "
    "of its own with two linear layers; leaves out an incomplete batch",
    "timm": "AdamW with cosine by steps; no frozen phase; the crop is of 77 to 100 % of the area, "
    "enlarged; leaves out an incomplete batch",
    "torchvision": "AdamW with cosine by epochs; no frozen phase; written in the manner of "
    "`references/classification/train.py`",
}
PHASES: tuple[Phase, ...] = ("frozen", "unfrozen")
COLORS = {
    "fit": "tab:blue",
    "fast": "tab:cyan",
    "lightning": "tab:purple",
    "fastai": "tab:green",
    "timm": "tab:orange",
    "torchvision": "tab:gray",
}


def spread(values: Sequence[float], form: str) -> str:
    """Return the median of some values and, of several, their range; "" of none."""
    if not values:
        return ""
    median = format(statistics.median(values), form)
    if len(values) == 1:
        return median
    return f"{median} ({min(values):{form}} to {max(values):{form}})"


def table(runs: Sequence[PeerRun]) -> list[list[str]]:
    """Return a row for each contestant: medians, with the range over rounds and epochs."""
    heading = [
        "",
        "frozen: images/s",
        "unfrozen: images/s",
        "test %",
        "minutes to it",
        "whole command, minutes",
        "memory at its peak, MB",
    ]
    rows = [heading]
    for peer, peer_runs in by_peer(runs).items():
        row = [PEERS[peer]]
        for phase in PHASES:
            row.append(spread(speeds_of(peer_runs, phase), ".0f"))
        row += [
            spread([100 * run.epochs[-1].accuracy for run in peer_runs], ".2f"),
            spread([run.epochs[-1].minutes for run in peer_runs], ".2f"),
            spread([run.minutes for run in peer_runs], ".2f"),
            spread([run.peak_bytes / 1e6 for run in peer_runs], ".0f"),
        ]
        rows.append(row)
    return rows


def epoch_rows(runs: Sequence[PeerRun]) -> list[list[object]]:
    """Return a row for each epoch of each run, below a heading."""
    heading: list[object] = [
        "contestant",
        "seed",
        "epoch",
        "phase",
        "images",
        "training_seconds",
        "images_per_second",
        "test_accuracy",
        "minutes",
        "whole_command_minutes",
        "peak_memory_bytes",
    ]
    rows = [heading]
    for run in runs:
        for number, epoch in enumerate(run.epochs, 1):
            rows.append(
                [
                    run.peer,
                    run.seed,
                    number,
                    epoch.phase,
                    epoch.images,
                    round(epoch.seconds, 3),
                    round(epoch.images_per_second, 1),
                    epoch.accuracy,
                    round(epoch.minutes, 4),
                    round(run.minutes, 4),
                    run.peak_bytes,
                ]
            )
    return rows


def draw(runs: Sequence[PeerRun], path: Path) -> None:
    """Draw accuracy against minutes, a line for each run, and the speeds in both phases."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    runs_of = by_peer(runs)
    _draw_curves(left, runs_of)
    _draw_speeds(right, runs_of)
    figure.savefig(path, dpi=150)


def _draw_curves(axes: Axes, runs_of: Mapping[str, Sequence[PeerRun]]) -> None:
    """Draw an open marker after a frozen epoch, and a filled one after another."""
    for peer, peer_runs in runs_of.items():
        color = COLORS[peer]
        label: str | None = PEERS[peer]
        for run in peer_runs:
            minutes = [epoch.minutes for epoch in run.epochs]
            percent = [100 * epoch.accuracy for epoch in run.epochs]
            axes.plot(minutes, percent, color=color, lw=1, label=label)
            label = None
            for epoch in run.epochs:
                axes.plot(
                    epoch.minutes,
                    100 * epoch.accuracy,
                    "o",
                    ms=5,
                    markerfacecolor=_fill(color, epoch.phase),
                    markeredgecolor=color,
                )
    axes.set_xlim(left=0)
    axes.set_xlabel("minutes since the command was started")
    axes.set_ylabel("test accuracy (%)")
    axes.set_title("open: after a frozen epoch", fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def _draw_speeds(axes: Axes, runs_of: Mapping[str, Sequence[PeerRun]]) -> None:
    """Draw a bar for each phase of each contestant: the median, with the range."""
    offsets = {"frozen": -0.2, "unfrozen": 0.2}
    for place, (peer, peer_runs) in enumerate(runs_of.items()):
        color = COLORS[peer]
        for phase in PHASES:
            speeds = speeds_of(peer_runs, phase)
            if not speeds:
                continue
            median = statistics.median(speeds)
            y = place + offsets[phase]
            axes.barh(y, median, 0.36, facecolor=_fill(color, phase), edgecolor=color)
            axes.hlines(y, min(speeds), max(speeds), color="black", lw=1)
            axes.annotate(
                f"{median:.0f}",
                (max(speeds), y),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize="small",
            )
    axes.set_yticks(range(len(runs_of)), [PEERS[peer] for peer in runs_of])
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel("training images/s")
    axes.set_title("open: frozen, filled: unfrozen", fontsize="medium")


def _fill(color: str, phase: Phase) -> str:
    """Return the colour inside of a marker or bar of a contestant."""
    if phase == "frozen":
        return "white"
    return color


def heading(job: PeerJob, cores: int, rounds: int, peer_versions: Mapping[str, str]) -> str:
    """Return sentences about what was measured, and on what."""
    libraries = []
    for library, number in {**versions(), **peer_versions}.items():
        libraries.append(f"{library} {number}")
    device = device_name(torch.device(job.device))
    return (
        f"ResNet18 at {job.image_size} pixels in batches of {job.batch_size}, learning rate "
        f"{job.lr:g}. Epochs: {job.frozen_epochs} frozen, {job.unfrozen_epochs} unfrozen. "
        f"{device}, threads: {cores}, loading processes: {job.workers}; {', '.join(libraries)}. "
        f"Rounds: {rounds}; medians, with the range.\n"
    )


def report(
    runs: Sequence[PeerRun],
    job: PeerJob,
    cores: int,
    rounds: int,
    peer_versions: Mapping[str, str],
) -> str:
    """Return the heading, the table and a note on each contestant, as Markdown.

    Args:
        runs: What was measured.
        job: What was trained.
        cores: Number of threads.
        rounds: Number of rounds.
        peer_versions: Versions of other programs by their names.
    """
    lines = [heading(job, cores, rounds, peer_versions), markdown(table(runs))]
    for peer in by_peer(runs):
        lines.append(f"* {PEERS[peer]}: {NOTES[peer]}.")
    return "\n".join(lines) + "\n"
