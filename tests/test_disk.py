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


def limited(folder, size, *options):
    """`fit` where no file can grow beyond `size` bytes, as where the disk has no more room."""
    return subprocess.run(
        [*COMMAND, *options],
        cwd=folder,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
    )


@pytest.mark.slow
def test_no_room_for_a_checkpoint_keeps_the_one_before_and_the_run_continues(tmp_path):
    """Unfrozen, the optimizer's state makes a checkpoint of 4 MB of one of 1.4 MB."""
    whole_run, folder = tmp_path / "whole", tmp_path / "full"
    whole_run.mkdir()
    folder.mkdir()
    run_fit(whole_run, *JOB)
    done = limited(folder, 2_000_000, *JOB)
    assert done.returncode == 2, done.stderr
    error = done.stderr.splitlines()[-1]
    assert error.startswith("error: The checkpoint ")
    assert error.endswith("cannot be written (File too large); the one before is kept.")
    assert "Traceback" not in done.stderr
    assert torch.load(folder / LAST, weights_only=True)["epoch"] == 0
    assert sorted(path.name for path in (folder / LAST).parent.iterdir()) == [
        "best.ckpt",
        "last.ckpt",
    ]
    run_fit(folder, f"--resume={RUN}")
    assert_same_weights(folder / LAST, whole_run / LAST)


@pytest.mark.slow
def test_no_room_for_the_curves_ends_the_run_with_a_sentence(tmp_path):
    done = limited(tmp_path, 6000, *JOB, "--trainer.enable_checkpointing=false")
    assert done.returncode == 2, done.stderr
    assert "File too large" in done.stderr.splitlines()[-1]
    assert f"--resume {RUN}" in done.stderr.splitlines()[-1]
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
    job = [*COMMAND, *JOB, "--trainer.max_epochs=1"]
    runs = [
        subprocess.Popen(
            [*job, f"--model.lr={rate}"],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rate in (0.001, 0.002)
    ]
    said = [run.communicate()[0].decode() for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    folders = sorted((tmp_path / "lightning_logs").iterdir())
    assert [folder.name for folder in folders] == ["version_0", "version_1"]
    for folder in folders:
        assert {"config.yaml", "checkpoints", "result.json"} <= {
            path.name for path in folder.iterdir()
        }
        assert len({path.name.split(".")[5] for path in folder.glob("events.*")}) == 1, (
            "of one process"
        )
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
    path, left, other = (
        tmp_path / "a.txt",
        ".a.txt.0123456789abcdef.partial",
        ".b.txt.0123456789abcdef.partial",
    )
    kept = [other, ".a.txt.partial", ".a.txt.mine.partial", ".a.txt.0123456789abcdef.partial.txt"]
    for name in (left, *kept):
        (tmp_path / name).touch()
    with atomic_write(path):
        assert (tmp_path / left).exists(), "its writer may be alive"
    for name in (left, *kept):
        os.utime(tmp_path / name, (0, 0))
    with atomic_write(path):
        pass
    assert sorted(found.name for found in tmp_path.iterdir()) == sorted(["a.txt", *kept])
    remove_partial(tmp_path)
    assert sorted(found.name for found in tmp_path.iterdir()) == sorted(["a.txt", *kept[1:]])
