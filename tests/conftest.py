"""What several tests share: a tiny job, real data where it is at hand."""

import copy
import logging
import multiprocessing
import os
import runpy
import signal
import sys
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import jsonargparse._common
import numpy as np
import pytest
from PIL import Image

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers and their processes share the cores. Threads that wait for each other would take most
    # of the time.
    os.environ["OMP_NUM_THREADS"] = "1"

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell has what it starts in the background ignore Ctrl-C, and so all that the tests start.
    signal.signal(signal.SIGINT, signal.default_int_handler)

import torch
from filelock import FileLock
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from cifar_transfer.training.logger import TENSORBOARD_TAGS

for name in ("lightning.pytorch", "lightning.fabric"):
    # They do so anyway if pytest has set up logging before they are imported, which depends on its
    # version.
    logging.getLogger(name).propagate = True

SHARED = Path(__file__).resolve().parents[1].parent / "shared"

# A network of 1.4 million parameters with batch-norm, on a few hundred drawn images.
TINY = [
    "--model.backbone=shufflenet_v2_x0_5",
    "--model.weights=none",
    "--data=ShapesDataModule",
    "--data.train_images=200",
    "--data.test_images=50",
    "--data.batch_size=32",
    "--trainer.accelerator=cpu",
    "--report.figures=false",  # seconds of drawing, which few tests look at
]


# Each run of `run_fit` is a fork of a server that has imported what takes seconds. Tests that start
# a process by themselves see that `python -m` does the same.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["cifar_transfer.cli.fit_cli", "cifar_transfer.inference.predictor"])


class Done(NamedTuple):
    """A process that has ended."""

    returncode: int
    stdout: str
    stderr: str


def run_module(folder, module, options, environment):
    multiprocessing.set_start_method("fork", force=True)  # as it is in a process of its own
    os.chdir(folder)
    os.environ |= environment
    for number, name, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, "out", os.O_WRONLY),
        (2, "err", os.O_WRONLY),
    ):
        os.dup2(os.open(environment["RUN_FIT"] + name if number else name, flags), number)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 # which knows what it writes to now
    sys.argv[1:] = options
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def run_fit(folder, *options, command=None, module="cifar_transfer.fit", expect=0, timeout=300):
    """Run `fit`, another command, or a module of the tests in `folder`, in its own process."""
    if command:
        module, options = "cifar_transfer", (command, *options)
    with TemporaryDirectory() as place:
        streams = [Path(place, name) for name in ("out", "err")]
        for stream in streams:
            stream.touch()
        environment = os.environ | {"RUN_FIT": f"{place}{os.sep}"}
        process = FORKS.Process(
            target=run_module, args=(folder, module, [*map(str, options)], environment)
        )
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            pytest.fail(f"{module} takes more than {timeout} s")
        done = Done(process.exitcode, *(stream.read_text(errors="replace") for stream in streams))
    assert done.returncode == expect, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def weights(checkpoint):
    """The state dict of a checkpoint."""
    return torch.load(checkpoint, "cpu", weights_only=True)["state_dict"]


def assert_same_weights(one, other):
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different, f"{len(different)} of {len(one)} tensors differ, first {different[:3]}"


@pytest.fixture(autouse=True)
def event_files_in_order(monkeypatch):
    """Let event files that one process opens within a second sort as they were opened.

    TensorBoard reads them in the order of their names, which end in a number that the process
    counts: file 10 would be read before file 9, and what it purges would be in the wrong file.
    """
    counter = event_file_writer.AtomicCounter(1000)
    monkeypatch.setattr(event_file_writer, "_global_uid", counter)


def curves(run):
    """Scalars of a run: (step, value) by name; of what was logged twice, the later one."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    names = {tag: name for name, tag in TENSORBOARD_TAGS.items()}
    scalars = {}
    for tag in events.Tags()["scalars"]:
        values = {event.step: event.value for event in events.Scalars(tag)}
        scalars[names.get(tag, tag)] = sorted(values.items())
    return scalars


@contextmanager
def untouched(*folders):
    """What is refused leaves every file and folder as it was, to the byte."""

    def content():
        paths = [path for folder in folders for path in sorted(Path(folder).rglob("*"))]
        return {path: path.read_bytes() if path.is_file() else None for path in paths}

    before = content()
    yield
    after = content()
    assert sorted(before) == sorted(after)
    assert [path for path in before if before[path] != after[path]] == []


def write_images(folder, per_class, size=(32, 32), classes=("cat", "dog"), seed=0):
    """An image folder `<class>/NNN.png` of noise."""
    rng = np.random.default_rng(seed)
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(per_class):
            pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i:03d}.png")


@pytest.fixture(autouse=True)
def _imports_as_before(monkeypatch):
    """What a resumed run forbids its process to import is allowed again for the next test."""
    monkeypatch.setattr(
        jsonargparse._common, "parsing_settings", copy.copy(jsonargparse._common.parsing_settings)
    )


def quiet_trainer(**options):
    """A Trainer on the CPU that prints nothing, and keeps only what its callbacks keep."""
    silent = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    keeps = any(isinstance(callback, ModelCheckpoint) for callback in options.get("callbacks", ()))
    return Trainer(**{"accelerator": "cpu", "enable_checkpointing": keeps} | silent | options)


@pytest.fixture
def shared():
    if not SHARED.is_dir():
        pytest.skip(f"real images and weights are not at hand in {SHARED}")
    return SHARED


RUN = "lightning_logs/version_0"


class Program:
    """What a pickle can hold: a call that is made when it is read."""

    def __init__(self, marker, call=None):
        self.call = call or (open, (str(marker), "w"))

    def __reduce__(self):
        return self.call


@pytest.fixture
def program(tmp_path):
    """Writes a program, and sees afterwards that it was not run."""
    marker = tmp_path / "it was run"
    calls = {"open": None, "system": (os.system, (f"touch '{marker}'",))}

    def write(path, call="open", inside=None):
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save((inside or (lambda it: it))(Program(marker, calls[call])), path)
        return path

    yield write
    assert not marker.exists(), "it was run"


def once(tmp_path_factory, name, make):
    """A folder that one of the test processes fills with `make(folder)`, for all of them to read.

    xdist's own way, `--dist loadgroup`, has no effect under pytest 9.2 (seen with xdist 3.8).
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            making = folder.with_name(f"{name} in the making")
            making.mkdir(exist_ok=True)
            make(making)
            making.rename(folder)
    return folder


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    options = [
        *TINY,
        "--trainer.max_epochs=1",
        "--freeze.unfreeze_epoch=0",
        "--report.figures=true",
    ]
    return once(tmp_path_factory, "run", lambda folder: run_fit(folder, *options))
