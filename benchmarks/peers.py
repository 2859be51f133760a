"""`fit` beside other programs that fine-tune, on the same images, weights and cores.

    python -m benchmarks.peers --root=IMAGES --weights=resnet18.pth --out=FOLDER [--timm=CHECKOUT]

IMAGES is laid out as `train/<class>/*` and `test/<class>/*`. The contestants are `fit` with its
default recipe and with `fast`, Lightning's `BackboneFinetuning`, fastai's `fine_tune`, `train.py`
of a checkout of timm, and the loop of torchvision's reference scripts. Each is a process of its
own, and they take turns, forwards and backwards, with another seed in each round.

All train ResNet18 from the same weights, at one size and in batches of one size, on images that are
cropped after padding and flipped, and validate on the test images after each epoch by their own
code. Optimizer, learning rate and weight decay are those of the options where a contestant has no
recipe of its own. What differs is told below the table.

FOLDER gets `peers.csv` (a row for each epoch), `peers.md` (medians over rounds), `peers.png` and
what each contestant printed.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks.memory_watch import MemoryWatch
from benchmarks.peer_job import EPOCH_MARK, PeerJob
from benchmarks.peer_report import draw, epoch_rows, report
from benchmarks.peer_runs import PEERS, Epoch, PeerRun
from benchmarks.peer_timm import SCRIPT
from cifar_transfer.base.errors import UserError, check, one_sentence
from cifar_transfer.base.files import make_folder, write_csv, write_text
from cifar_transfer.base.machine import cores

CHECKOUT = Path(__file__).parents[1]
FAILED = 1  # exit status


def fit_command(job: PeerJob, recipe: Sequence[str], frozen_epochs: int) -> list[str]:
    """Return the command of `fit` with a recipe."""
    print_epochs = {
        "class_path": "benchmarks.peer_epochs.PrintEpochs",
        "init_args": {"frozen_epochs": frozen_epochs},
    }
    return [
        sys.executable,
        *("-m", "cifar_transfer.fit"),
        *recipe,
        f"--seed_everything={job.seed}",
        "--data=ImageFolderDataModule",
        f"--data.root={job.root}",
        "--data.val_fraction=0",  # validation uses the test images
        f"--data.batch_size={job.batch_size}",
        f"--data.num_workers={job.workers}",
        "--data.augment=cifar",
        "--data.augment.brightness=0",
        "--data.augment.contrast=0",
        "--data.augment.saturation=0",
        "--data.augment.hue=0",
        "--data.augment.degrees=0",
        f"--model.weights={job.weights}",
        "--model.normalize=imagenet",
        f"--model.image_size={job.image_size}",
        f"--model.lr={job.lr}",
        f"--freeze.unfreeze_epoch={frozen_epochs}",
        f"--trainer.max_epochs={job.epochs}",
        f"--trainer.accelerator={job.device}",
        "--trainer.devices=1",
        f"--trainer.callbacks={json.dumps([print_epochs])}",
    ]


def command(peer: str, job: PeerJob, timm_checkout: Path | None) -> list[str]:
    """Return the command of a contestant."""
    if peer == "fit":
        return fit_command(job, [], job.frozen_epochs)
    if peer == "fast":
        return fit_command(job, ["--config=fast", "--model.train_sizes=null"], 0)
    arguments = [job.to_json()]
    if peer == "timm":
        arguments.append(str(timm_checkout))
    return [sys.executable, "-m", f"benchmarks.peer_{peer}", *arguments]


def reasons_to_leave_out(timm_checkout: Path | None) -> dict[str, str]:
    """Return the contestants that cannot take part, each with a sentence that says why.

    Raises:
        UserError: The checkout of timm has no `train.py`.
    """
    reasons = {}
    if importlib.util.find_spec("fastai") is None:
        reasons["fastai"] = "fastai is left out, because it is not installed."
    if timm_checkout is None:
        reasons["timm"] = (
            "timm's train.py is left out, because no checkout of pytorch-image-models is named "
            "(--timm=PATH)."
        )
    elif not (timm_checkout / SCRIPT).is_file():
        raise UserError(
            f"{timm_checkout} has no {SCRIPT}: --timm takes a checkout of pytorch-image-models."
        )
    return reasons


def peer_versions(peers: Sequence[str], timm_checkout: Path | None) -> dict[str, str]:
    """Return the versions of fastai and of the checkout of timm, if they take part."""
    numbers = {}
    if "fastai" in peers:
        numbers["fastai"] = version("fastai")
    if "timm" in peers and timm_checkout is not None:
        text = (timm_checkout / "timm" / "version.py").read_text()
        numbers["timm"] = text.partition("=")[2].strip().strip("'\"")
    return numbers


def run_peer(
    peer: str, job: PeerJob, timm_checkout: Path | None, threads: int, log: Path
) -> PeerRun | None:
    """Run a contestant to its end, in a folder of its own, which is removed afterwards.

    What it writes there, `fit`'s decoded images too, is no help to a later run.

    Args:
        peer: Key of `PEERS`.
        job: What it trains.
        timm_checkout: Folder of timm's `train.py`.
        threads: Number of threads.
        log: File for what it prints.

    Returns:
        The run, or None if it failed.
    """
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": os.pathsep.join([str(CHECKOUT), os.environ.get("PYTHONPATH", "")]),
    }
    epochs = []
    with tempfile.TemporaryDirectory(dir=log.parent) as folder:
        images = Path(folder, "images")
        images.mkdir()
        for split in ("train", "test"):
            (images / split).symlink_to(Path(job.root, split), target_is_directory=True)
        start = time.monotonic()
        process = subprocess.Popen(
            command(peer, replace(job, root=str(images)), timm_checkout),
            cwd=folder,
            env=environment | {"FASTAI_HOME": folder},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        with process, MemoryWatch(process.pid) as memory, log.open("w", buffering=1) as file:
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    minutes = (time.monotonic() - start) / 60
                    file.write(line)
                    if line.startswith(EPOCH_MARK):
                        values = json.loads(line.removeprefix(EPOCH_MARK))
                        epochs.append(Epoch(**values, minutes=minutes))
            except BaseException:
                process.kill()
                raise
            status = process.wait()
        minutes = (time.monotonic() - start) / 60
    if status != 0 or len(epochs) != job.epochs:
        return None
    return PeerRun(peer, job.seed, epochs, minutes, memory.peak_bytes)


def run_all(
    peers: Sequence[str],
    job: PeerJob,
    timm_checkout: Path | None,
    rounds: int,
    threads: int,
    out: Path,
) -> tuple[list[PeerRun], list[str]]:
    """Run the contestants in turns, forwards and backwards.

    One that fails says so, and takes part in no further round.

    Returns:
        The runs, and the contestants that failed.
    """
    runs = []
    failed: list[str] = []
    for seed in range(rounds):
        order = list(peers)
        if seed % 2 == 1:
            order.reverse()
        for peer in order:
            if peer in failed:
                continue
            log = out / f"{peer}-{seed}.log"
            run = run_peer(peer, replace(job, seed=seed), timm_checkout, threads, log)
            if run is None:
                failed.append(peer)
                print(f"{PEERS[peer]} failed; what it printed is in {log}.", flush=True)
                continue
            runs.append(run)
            last = run.epochs[-1]
            print(
                f"round {seed + 1} of {rounds}, {PEERS[peer]}: {last.accuracy:.2%} of the test "
                f"images after {last.minutes:.2f} minutes",
                flush=True,
            )
    return runs, failed


@contextmanager
def first_cores(count: int) -> Iterator[None]:
    """Keep this process and those that it starts on its first so many cores, where that works."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(allowed)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def read_all(root: Path) -> None:
    """Read all files once, so that the first contestant does not wait for the disk alone."""
    for path in root.rglob("*"):
        if path.is_file():
            path.read_bytes()


def parse(args: Sequence[str]) -> argparse.Namespace:
    """Return the options.

    Raises:
        UserError: One of them cannot be used.
    """
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    device = "cpu"
    if torch.cuda.is_available():
        device = "cuda"
    parser.add_argument("--root", type=Path, required=True, help="Folder of the images.")
    parser.add_argument("--weights", type=Path, required=True, help="State dict of ResNet18.")
    parser.add_argument("--out", type=Path, required=True, help="Folder for what is measured.")
    parser.add_argument("--timm", type=Path, help="Checkout of pytorch-image-models.")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--rounds", type=int, default=3, help="Runs of each contestant.")
    parser.add_argument("--image_size", type=int, default=32, help="Pixels.")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--frozen_epochs", type=int, default=1)
    parser.add_argument("--unfrozen_epochs", type=int, default=1)
    parser.add_argument("--lr", type=float, default=1e-3, help="Learning rate.")
    parser.add_argument("--cores", type=int, default=cores(), help="Also the threads.")
    parser.add_argument("--workers", type=int, help="Loading processes; as many as cores.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device)
    options = parser.parse_args(args)
    for name in ("rounds", "image_size", "frozen_epochs", "unfrozen_epochs"):
        check(f"--{name}", getattr(options, name), lambda value: value >= 1, "1 or more")
    most = cores()
    check("--cores", options.cores, lambda value: 1 <= value <= most, f"1 to {most}")
    check("--batch_size", options.batch_size, lambda value: value >= 2, "2 or more")
    check("--lr", options.lr, lambda value: 0 < value < float("inf"), "a positive number")
    if options.workers is None:
        options.workers = options.cores
    check("--workers", options.workers, lambda value: value >= 0, "0 or more")
    for split in ("train", "test"):
        if not (options.root / split).is_dir():
            raise UserError(f"{options.root} has no folder {split}: --root takes a folder with it.")
    if not options.weights.is_file():
        raise UserError(f"{options.weights} is no file: --weights takes a state dict of ResNet18.")
    return options


def job_of(options: argparse.Namespace) -> PeerJob:
    """Return what the contestants train."""
    return PeerJob(
        root=str(options.root.resolve()),
        weights=str(options.weights.resolve()),
        image_size=options.image_size,
        batch_size=options.batch_size,
        frozen_epochs=options.frozen_epochs,
        unfrozen_epochs=options.unfrozen_epochs,
        lr=options.lr,
        workers=options.workers,
        seed=0,
        device=options.device,
    )


def main(args: Sequence[str]) -> int:
    """Run all, write what was measured, and return the exit status.

    Raises:
        UserError: An option cannot be used, or no contestant is left.
    """
    options = parse(args)
    timm_checkout = options.timm
    if timm_checkout is not None:
        timm_checkout = timm_checkout.resolve()
    reasons = reasons_to_leave_out(timm_checkout)
    peers = []
    for peer in PEERS:
        if peer not in options.peers:
            continue
        if peer in reasons:
            print(reasons[peer], flush=True)
        else:
            peers.append(peer)
    if not peers:
        raise UserError("No contestant is left to run: name others by --peers.")
    job = job_of(options)
    out = options.out.resolve()
    make_folder(out, "--out")
    read_all(options.root)
    with first_cores(options.cores):
        runs, failed = run_all(peers, job, timm_checkout, options.rounds, options.cores, out)
    if runs:
        numbers = peer_versions(peers, timm_checkout)
        text = report(runs, job, options.cores, options.rounds, numbers)
        print(f"\n{text}", end="")
        write_text(out / "peers.md", text)
        write_csv(out / "peers.csv", epoch_rows(runs))
        draw(runs, out / "peers.png")
    if failed:
        return FAILED
    return 0


if __name__ == "__main__":
    with one_sentence():
        sys.exit(main(sys.argv[1:]))
