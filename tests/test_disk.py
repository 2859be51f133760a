"""Disks that are full, and runs that start at the same moment in one folder."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY, assert_same_weights, run_fit

from cifar_transfer.base.files import atomic_write, remove_partial

RUN = "lightning_logs/version_0"
LAST = f"{RUN}/checkpoints/last.ckpt"
JOB = [
    *TINY,
    "--trainer.max_epochs=3",
    "--freeze.unfreeze_epoch=1",
    "--trainer.log_every_n_steps=1",
]
COMMAND = [sys.executable, "-m", "cifar_transfer.fit"]


def fit_with_file_limit(folder, max_bytes, *options):
    """Run `fit` where no file can grow beyond a size, as where the disk is full."""
    limits = (max_bytes, max_bytes)
    return subprocess.run(
        [*COMMAND, *options],
        cwd=folder,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits),
    )


@pytest.mark.whole
def test_no_room_for_a_checkpoint_keeps_the_one_before_and_the_run_continues(tmp_path):
    """Unfrozen, the optimizer's state makes a checkpoint of 4 MB of one of 1.4 MB."""
    whole_run = tmp_path / "whole"
    folder = tmp_path / "full"
    whole_run.mkdir()
    folder.mkdir()
    run_fit(whole_run, *JOB)
    done = fit_with_file_limit(folder, 2_000_000, *JOB)
    assert done.returncode == 2, done.stderr
    error = done.stderr.splitlines()[-1]
    assert error.startswith("error: The checkpoint ")
    assert error.endswith("cannot be written (File too large); the one before is kept.")
    assert "Traceback" not in done.stderr
    assert torch.load(folder / LAST, weights_only=True)["epoch"] == 0
    names = [path.name for path in (folder / LAST).parent.iterdir()]
    assert sorted(names) == ["best.ckpt", "last.ckpt"]
    run_fit(folder, f"--resume={RUN}")
    assert_same_weights(folder / LAST, whole_run / LAST)


@pytest.mark.whole
def test_no_room_for_the_curves_ends_the_run_with_a_sentence(tmp_path):
    options = [*JOB, "--trainer.enable_checkpointing=false"]
    done = fit_with_file_limit(tmp_path, 6000, *options)
    assert done.returncode == 2, done.stderr
    error = done.stderr.splitlines()[-1]
    assert "File too large" in error
    assert f"--resume {RUN}" in error
    assert "Traceback" not in done.stderr


@pytest.mark.whole
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_full_disk_in_earnest(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=7m", "tmpfs", disk], check=True)
    try:
        run = subprocess.run(
            [*COMMAND, *JOB], cwd=disk, capture_output=True, text=True, timeout=120
        )
        assert run.returncode == 2, run.stderr
        assert "No space left on device" in run.stderr.splitlines()[-1]
        assert torch.load(disk / LAST, weights_only=True)["epoch"] == 0
        subprocess.run(["mount", "-o", "remount,size=60m", disk], check=True)
        assert "test accuracy" in run_fit(disk, f"--resume={RUN}").stdout
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.whole
def test_two_runs_that_start_at_once_have_two_folders(tmp_path):
    processes = []
    for rate in (0.001, 0.002):
        command = [*COMMAND, *JOB, "--trainer.max_epochs=1", f"--model.lr={rate}"]
        process = subprocess.Popen(
            command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        processes.append(process)
    outputs = [process.communicate()[0].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    folders = sorted((tmp_path / "lightning_logs").iterdir())
    assert [folder.name for folder in folders] == ["version_0", "version_1"]
    for folder in folders:
        names = {path.name for path in folder.iterdir()}
        assert {"config.yaml", "checkpoints", "result.json"} <= names
        writers = {path.name.split(".")[5] for path in folder.glob("events.*")}
        assert len(writers) == 1, "process that wrote the event files"
        assert json.loads((folder / "result.json").read_text())["epochs"] == 1


def test_a_file_is_whole_or_as_before(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("before")
    with pytest.raises(ValueError, match="int"), atomic_write(path) as file:
        file.write(b"half" * int("no number"))
    assert path.read_text() == "before"
    with atomic_write(path) as file:
        file.write(b"after")
        assert path.read_text() == "before"
    assert path.read_text() == "after"
    assert list(Path(tmp_path).iterdir()) == [path]


def test_two_writers_of_one_file_do_not_share_a_temporary_file(tmp_path):
    path = tmp_path / "a.txt"
    with atomic_write(path) as first:
        first.write(b"first")
        with atomic_write(path) as second:
            second.write(b"the second one")
        assert path.read_text() == "the second one"
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_writer_has_left_is_removed_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    abandoned = ".a.txt.0123456789abcdef.partial"
    abandoned_by_another = ".b.txt.0123456789abcdef.partial"
    others = [".a.txt.partial", ".a.txt.mine.partial", ".a.txt.0123456789abcdef.partial.txt"]
    all_names = [abandoned, abandoned_by_another, *others]
    for name in all_names:
        (tmp_path / name).touch()
    with atomic_write(path):
        assert (tmp_path / abandoned).exists(), "its writer may be alive"
    for name in all_names:
        os.utime(tmp_path / name, (0, 0))
    with atomic_write(path):
        pass
    assert names_in(tmp_path) == sorted(["a.txt", abandoned_by_another, *others])
    remove_partial(tmp_path)
    assert names_in(tmp_path) == sorted(["a.txt", *others])


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())
