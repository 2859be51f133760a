"""File systems that fail in the middle of something: full, gone, without locks."""

import os
import re
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import TINY, run_fit, untouched, write_images

from cifar_transfer.base.errors import one_sentence
from cifar_transfer.commands import predict
from cifar_transfer.commands.export import export
from cifar_transfer.commands.figures import figures
from cifar_transfer.results.comparison import ComparedNetwork, ComparedRun, write_comparison

RUN = "lightning_logs/version_0"
JOB = [option for option in TINY if not option.startswith("--model.backbone")]
JOB += ["--model.backbone=lenet5", "--trainer.max_epochs=1", "--freeze.unfreeze_epoch=0"]
TESTS = Path(__file__).parent


def faulty(folder, *arguments):
    """`fault_job`, whose words come through pipes: files of them might not grow either."""
    command = [sys.executable, "-m", "fault_job", *map(str, arguments)]
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


def whole(*names):
    return [pytest.param(name, marks=pytest.mark.whole) for name in names]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        r"config\.yaml",
        *whole(
            r"tfevents.*\.1$",  # opened for the final figures
            r"metrics\.csv",
            r"splits\.json",
            r"hparams\.yaml",
            r"tfevents.*\.0$",
            r"augmented\.png",
            r"best\.ckpt",
            r"last\.ckpt",
        ),
        *whole(r"predictions-test", r"epochs\.png", r"test-mistakes\.png", r"result\.json"),
    ],
)
def test_no_room_for_a_file_of_a_run(tmp_path, name):
    """A sentence with what to do, and to do it leads to a whole run."""
    done = faulty(
        tmp_path, "full", name, 1, "ENOSPC", "cifar_transfer.fit", *JOB, "--report.figures=true"
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    error = done.stderr.splitlines()[-1]
    assert re.search(r"cannot be written \(File too large\)", error), error
    assert not list(tmp_path.rglob("*.partial"))
    begun = "start it again" not in error
    assert error.endswith(f"--resume {RUN}") or not begun or ".ckpt cannot be written" in error
    again = run_fit(tmp_path, *([f"--resume={RUN}"] if begun else JOB)).stdout
    assert "test accuracy" in again


@contextmanager
def no_file_beyond(size):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def of_commands(run, images, out):
    """What commands write, by name, and the calls that do it."""
    best = run / RUN / "checkpoints" / "best.ckpt"
    result = {"best/val_acc": 0.5, "parameters": 1, "seconds": 1, "images_per_second": 1}
    network = ComparedNetwork("a", "a", scratch=True, runs=[ComparedRun(0, result)])
    shown = [str(images), f"--ckpt={best}", "--accelerator=cpu"]
    return {
        "best.pth": lambda: export(str(best), "state_dict", str(out / "best.pth")),
        "best.safetensors": lambda: export(str(best), "safetensors", str(out / "best.safetensors")),
        "best.pt2": lambda: export(str(best), "torch_export", str(out / "best.pt2")),
        "top.png": lambda: predict.main([*shown, f"--figure={out / 'top.png'}"]),
        "maps/00001-000.png": lambda: predict.main([*shown, f"--explain={out / 'maps'}"]),
        "comparison.png": lambda: write_comparison([network], out),
        "figures/epochs.png": lambda: figures(str(out)),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", of_commands(Path(), Path(), Path()))
def test_no_room_for_what_a_command_writes_keeps_what_was_there(run, tmp_path, capfd, name):
    write_images(tmp_path / "photos" / "a", 1, classes=["b"])
    out = tmp_path / "out"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_bytes(b"of before")
    (out / "config.yaml").write_bytes((run / RUN / "config.yaml").read_bytes())
    (out / "metrics.csv").write_bytes((run / RUN / "metrics.csv").read_bytes())
    call = of_commands(run, tmp_path / "photos", out)[name]
    for path in (
        *("comparison.md", "comparison.csv", "comparison.tex", "comparison-runs.csv"),
        *("best.json", "figures/iterations.png"),
    ):
        if path.startswith(name.partition(".")[0]) or path.startswith(name.partition("/")[0]):
            (out / path).write_bytes(b"")  # smaller than the limit
    before = sorted(path.name for path in out.rglob("*"))
    with pytest.raises(SystemExit, match=r"^2$"), one_sentence(), no_file_beyond(5000):
        call()
    error = capfd.readouterr().err.splitlines()[-1]
    assert f"{Path(name).name} cannot be written (File too large)" in error
    assert (out / name).read_bytes() == b"of before"
    assert sorted(path.name for path in out.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("event", "name", "error", "words"),
    [
        (
            "os.rename",
            "result.json",
            "ESTALE",
            f"result.json cannot be read or written (Stale file handle): .* {RUN}$",
        ),
        (
            "os.mkdir",
            "lightning_logs$",
            "EACCES",
            "lightning_logs cannot be .* (Permission denied): .* start it again",
        ),
        *(
            pytest.param(*case, marks=pytest.mark.whole)
            for case in [
                (
                    "os.rename",
                    "last.ckpt",
                    "EIO",
                    "last.ckpt cannot be written (Input/output error); there is none",
                ),
                (
                    "os.rename",
                    "config.yaml",
                    "EXDEV",
                    "config.yaml cannot be .* (Invalid cross-.*): .* start it again",
                ),
                (
                    "fsync",
                    "config.yaml",
                    "EIO",
                    "config.yaml cannot be .* (Input/output error): .* start it again",
                ),
                (
                    "open",
                    "tfevents",
                    "EACCES",
                    r"tfevents.* cannot be .* (Permission denied): .* Continue with",
                ),
            ]
        ),
    ],
)
def test_a_file_system_that_fails_ends_the_run_with_a_sentence(tmp_path, event, name, error, words):
    done = run_fit(
        tmp_path, event, name, 1, error, "cifar_transfer.fit", *JOB, module="fault_job", expect=2
    )
    assert "Traceback" not in done.stderr
    said = done.stderr.splitlines()[-1]
    assert re.search(words.replace("(", r"\(").replace(")", r"\)"), said), said
    assert not list(tmp_path.rglob("*.partial"))
    begun = "start it again" not in said
    assert "test accuracy" in run_fit(tmp_path, *([f"--resume={RUN}"] if begun else JOB)).stdout


def test_a_file_system_without_locks_is_told_and_trained_on(tmp_path):
    done = run_fit(
        tmp_path, "fcntl.flock", ".", 1, "ENOLCK", "cifar_transfer.fit", *JOB, module="fault_job"
    )
    assert f"{RUN} cannot be locked (No locks available)" in done.stderr
    assert "test accuracy" in done.stdout


@pytest.mark.slow
def test_a_file_system_that_knows_no_fsync_is_written_all_the_same(tmp_path):
    done = run_fit(
        tmp_path, "fsync", ".", 1, "EINVAL", "cifar_transfer.fit", *JOB, module="fault_job"
    )
    assert "test accuracy" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("event", "name", "error"),
    [
        ("fcntl.flock", "train.lock", "ENOLCK"),
        ("os.rename", r"train-.*\.npy", "EXDEV"),
        pytest.param("fsync", "train-", "EIO", marks=pytest.mark.whole),
        pytest.param("os.rename", r"train-.*\.npy", "ESTALE", marks=pytest.mark.whole),
    ],
)
def test_a_cache_that_cannot_be_made_costs_no_run(tmp_path, event, name, error):
    write_images(tmp_path / "photos" / "train", 10)
    with untouched(tmp_path / "photos" / "train"):
        options = [option for option in JOB if not option.startswith("--data")]
        options += ["--data=ImageFolderDataModule", "--data.root=photos", "--data.batch_size=4"]
        done = run_fit(
            tmp_path, event, name, 1, error, "cifar_transfer.fit", *options, module="fault_job"
        )
    assert "Images are not cached but decoded anew" in done.stderr


IMAGE = "photos/train/cat/007.png"
GONE = f"{IMAGE} (does not exist|cannot be read \\(No such file)"


@pytest.mark.parametrize("on_the_fly", [False, True])
@pytest.mark.parametrize(
    ("moment", "damage", "words"),
    [
        (2, f"rm {IMAGE}", GONE),  # after the first image was looked at for its size
        *(
            pytest.param(*case, marks=pytest.mark.whole)
            for case in [
                (2, f"truncate -s 40 {IMAGE}", f"{IMAGE} cannot be decoded as an image"),
                (2, f"rm {IMAGE}; mkfifo {IMAGE}", f"{IMAGE} cannot be read \\(is no regular file"),
                (
                    2,
                    "rm -r photos/train/cat",
                    "photos/train/cat/.* (does not exist|cannot be read)",
                ),
                (4, f"mv {IMAGE} {IMAGE}.moved", GONE),  # on the fly, in the first epoch
                (2, f"cp other.png {IMAGE}", ""),
                (2, f"cp {IMAGE} photos/train/cat/new.png", ""),
            ]
        ),
    ],
)
def test_images_that_change_while_they_are_read_are_named(
    tmp_path, moment, damage, words, on_the_fly
):
    for split, count in (("train", 12), ("test", 4)):
        write_images(tmp_path / "photos" / split, count, seed=count)
    write_images(tmp_path, 1, size=(50, 40), classes=["other"])
    (tmp_path / "other" / "000.png").rename(tmp_path / "other.png")
    options = [
        option for option in JOB if not option.startswith(("--data", "--trainer.max_epochs"))
    ]
    options += [
        "--data=ImageFolderDataModule",
        "--data.root=photos",
        "--data.batch_size=4",
        "--trainer.max_epochs=2",
    ]
    options += ["--data.cache_limit_gb=0"] if on_the_fly else []
    fault = ("then", "train/cat/000.png", moment, damage, "cifar_transfer.fit")
    refused = bool(words) and (on_the_fly or moment == 2)
    done = run_fit(tmp_path, *fault, *options, module="fault_job", expect=2 * refused)
    assert "Traceback" not in done.stderr
    assert re.search(words if refused else "", done.stderr.splitlines()[-1])
    cached = set((tmp_path / "photos" / ".cifar_transfer").glob("train-*"))
    cached -= {
        path for path in cached if path.name == "train-checked.json"
    }  # of files as they were
    assert not cached or not refused


@pytest.mark.slow
@pytest.mark.parametrize("command", [["cifar_transfer"], ["cifar_transfer", "backbones"]])
def test_a_reader_that_leaves_is_no_error(command):
    """As `head` does, here before the first line."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", *command], stdout=writer, stderr=subprocess.PIPE, cwd=TESTS.parent
    )
    os.close(writer)
    assert done.stderr == b""
    assert done.returncode in (128 + signal.SIGPIPE, -signal.SIGPIPE)
