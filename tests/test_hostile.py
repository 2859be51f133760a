"""Files that would hang the program, fill its memory, or make it say or delete what it should not."""

import csv
import io
import json
import os
import re
import resource
import shutil
import struct
import subprocess
import sys
import zlib
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import RUN, untouched, write_images
from matplotlib.text import Text
from PIL import Image

from cifar_transfer import Classifier, ImageFolderDataModule
from cifar_transfer.base.errors import UserError
from cifar_transfer.base.text import without_password
from cifar_transfer.cli.fit_cli import FitCLI
from cifar_transfer.cli.recipes import check_recipe
from cifar_transfer.commands import predict
from cifar_transfer.commands.figures import figures
from cifar_transfer.commands.fit import fit
from cifar_transfer.data import cifar, loading
from cifar_transfer.data.cache import CACHE_FOLDER, cached
from cifar_transfer.data.images import ArrayImages, read_image, read_size
from cifar_transfer.data.loading import workers_within
from cifar_transfer.network.dense_conv import DenseConv2d
from cifar_transfer.results import plots
from cifar_transfer.results.predictions import ImagePrediction, Predictions
from cifar_transfer.results.words import lettering
from cifar_transfer.training.checkpoint_file import RAW_STATE_KEY

BROKEN_YAML = {
    "no YAML": (b"a: [1\nb: {", r"cannot be read as YAML \(line 2"),
    "control characters": (b"a: \x00", r"cannot be read as YAML \(unacceptable character"),
    "another encoding": (b"seed_everything: \xff", r"no text in UTF-8 \(byte 17\)"),
}


@pytest.fixture
def others(tmp_path, monkeypatch, run):
    """A copy of somebody's run, beside which the process works."""
    shutil.copytree(run / "lightning_logs", tmp_path / "lightning_logs")
    monkeypatch.chdir(tmp_path)
    return Path(RUN)


@pytest.mark.parametrize(("content", "message"), BROKEN_YAML.values(), ids=BROKEN_YAML)
def test_a_configuration_that_is_no_yaml_is_refused_in_a_sentence(others, content, message):
    (others / "config.yaml").write_bytes(content)
    uses = (
        lambda: fit([f"--resume={others}"]),
        lambda: fit([f"--config={others}/config.yaml"]),
        lambda: figures(str(others)),
    )
    for use in uses:
        with untouched(others), pytest.raises(UserError, match=message) as raised:
            use()
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("writer", ["ModelCheckpoint", "CSVLogger", "SimpleProfiler"])
def test_a_resumed_configuration_writes_nowhere_else(others, tmp_path, writer):
    config = yaml.safe_load((others / "config.yaml").read_text())
    place = str(tmp_path / "elsewhere")
    entry = {
        "class_path": writer,
        "init_args": {"save_dir" if writer == "CSVLogger" else "dirpath": place},
    }
    key, value = {
        "ModelCheckpoint": ("callbacks", [entry]),
        "CSVLogger": ("logger", [entry]),
        "SimpleProfiler": ("profiler", entry),
    }[writer]
    config["trainer"][key] = value
    (others / "config.yaml").write_text(yaml.safe_dump(config))
    with (
        untouched(tmp_path),
        pytest.raises(UserError, match=f"has files written to {re.escape(place)}"),
    ):
        fit([f"--resume={others}", "--trainer.max_epochs=2"])
    entry["init_args"] = {"save_dir" if writer == "CSVLogger" else "dirpath": str(others / "more")}
    (others / "config.yaml").write_text(yaml.safe_dump(config))
    FitCLI([f"--resume={others}"]).folder.release()


TAMPERED = {
    "num_classes": ("hyper_parameters", "num_classes", -3),
    "class_names": ("hyper_parameters", "class_names", [1, None, {}]),
    "image_size": ("hyper_parameters", "image_size", 60_000),
    "input_size": ("input_size", None, [0, 0]),
    "input_size, text": ("input_size", None, "large"),
    "geometry": ("geometry", "size", [32, 60_000]),
    "geometry, more": ("geometry", "run", "rm"),
    "geometry, mean": ("geometry", "mean", [0.5, float("nan"), 0.5]),
    "geometry, std": ("geometry", "std", [0.5, 0, 0.5]),
    "global_step": ("global_step", None, "\x1b[2J"),
    "averaged_steps": ("averaged_steps", None, -1),
}


@pytest.mark.parametrize(("field", "key", "value"), TAMPERED.values(), ids=TAMPERED)
def test_fields_that_no_run_writes_are_refused_by_name(others, field, key, value):
    best = others / "checkpoints" / "best.ckpt"
    whole = torch.load(best, weights_only=True)
    if key:
        whole[field][key] = value
    else:
        whole[field] = value
    torch.save(whole, best)
    name = key if field == "hyper_parameters" else field
    with pytest.raises(
        UserError, match=rf"best\.ckpt is damaged or was altered: its {name} cannot be"
    ) as error:
        Classifier.load(best, "cpu")
    assert "\x1b" not in str(error.value)


@pytest.mark.parametrize(
    ("part", "bad"),
    [("state_dict", torch.nan), ("state_dict", torch.inf), (RAW_STATE_KEY, torch.nan)],
)
def test_weights_that_are_nan_are_refused_instead_of_answering_nan(others, part, bad):
    best = others / "checkpoints" / "best.ckpt"
    whole = torch.load(best, weights_only=True)
    whole[part] = {name: value.clone() for name, value in whole["state_dict"].items()}
    name = next(name for name in whole[part] if name.endswith("weight"))
    whole[part][name][(0,) * whole[part][name].dim()] = bad
    torch.save(whole, best)
    with pytest.raises(UserError, match=f"weights are NaN or infinite, first in {re.escape(name)}"):
        Classifier.load(best, "cpu")


@pytest.mark.parametrize("link", [False, True])
def test_a_pipe_named_as_an_image_keeps_nobody_waiting(tmp_path, link):
    pipe = tmp_path / "x.png"
    os.mkfifo(tmp_path / "pipe" if link else pipe)
    if link:
        pipe.symlink_to(tmp_path / "pipe")
    for read in (read_image, read_size):
        with pytest.raises(UserError, match=r"x\.png cannot be read \(is no regular file\)"):
            read(pipe)
    write_images(tmp_path / "photos" / "train", 5)
    pipe.rename(tmp_path / "photos" / "train" / "cat" / "x.png")
    data = ImageFolderDataModule(str(tmp_path / "photos"))
    if link:
        with pytest.raises(UserError, match="is no regular file"):
            data.prepare_data()
    else:
        data.prepare_data()  # which takes files alone


def two(tmp_path):
    """Two images, and a folder for their cache."""
    return ArrayImages(
        np.zeros((2, 3, 4, 4), np.uint8), np.arange(2)
    ), tmp_path / "data" / CACHE_FOLDER


def test_nothing_but_our_own_files_is_removed_from_a_cache(tmp_path):
    images, folder = two(tmp_path)
    folder.mkdir(parents=True)
    for name in (
        "train-holiday.jpg",
        "train-0123456789abcdef.npy.bak",
        "train-0123456789abcdef",
        ".train-notes",
    ):
        (folder / name).write_text("mine")
    stale = folder / "train-0123456789abcdef.npz"
    stale.write_text("ours")
    (folder / "train-fedcba9876543210.npy").mkdir()
    (folder / "train-aaaaaaaaaaaaaaaa.npy").symlink_to(folder / "train-holiday.jpg")
    before = sorted(path.name for path in folder.iterdir() if path != stale)
    assert isinstance(cached(folder.parent, "train", 1, lambda: images), ArrayImages)
    after = {path.name for path in folder.iterdir()}
    assert set(before) <= after
    assert stale.name not in after


def test_a_link_and_a_folder_that_others_write_into_are_no_caches(tmp_path, monkeypatch):
    images, folder = two(tmp_path)
    monkeypatch.setattr(
        "cifar_transfer.data.cache.platformdirs.user_cache_path",
        lambda name: tmp_path / "own" / name,
    )
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    folder.parent.mkdir()
    folder.symlink_to(theirs)
    cached(folder.parent, "train", 1, lambda: images)
    assert not list(theirs.iterdir())
    folder.unlink()
    folder.mkdir()
    if os.getuid() == 0:
        os.chown(folder, 12345, 12345)
        folder.chmod(0o777)
        cached(folder.parent, "train", 1, lambda: images)
        assert not list(folder.iterdir())
    assert len(list((tmp_path / "own").rglob("*.npy"))) == 1


@pytest.mark.parametrize("kind", ["link", "folder"])
def test_what_is_no_lock_is_told(tmp_path, kind):
    images, folder = two(tmp_path)
    folder.mkdir(parents=True)
    lock = folder / "train.lock"
    lock.mkdir() if kind == "folder" else lock.symlink_to(tmp_path / "elsewhere")
    with pytest.warns(UserWarning, match=r"not cached .*train\.lock cannot be locked"):
        assert cached(folder.parent, "train", 1, lambda: images) is images
    assert not (tmp_path / "elsewhere").exists()


def test_a_folder_in_the_place_of_the_cache_is_told(tmp_path):
    images, folder = two(tmp_path)
    folder.parent.mkdir()
    cached(folder.parent, "train", 1, lambda: images)
    (pixels,) = folder.glob("*.npy")
    pixels.unlink()
    pixels.mkdir()
    with pytest.warns(UserWarning, match="are damaged|not cached"):
        assert len(cached(folder.parent, "train", 1, lambda: images)) == 2


ESCAPES = ["=HYPERLINK(1)", "a\nb", "\x1b[2Jred", "\x9bgreen", "+1", "@sum", "-2"]


def test_no_name_steers_a_terminal_forges_a_row_or_is_executed():
    source = "folder/\x1b]0;title\x07\nfile.png"
    seen = [ImagePrediction(source, None, [(name, 0.1) for name in ESCAPES])]
    texts = {name: "".join(form(seen, ESCAPES)) for name, form in predict.FORMATS.items()}
    for text in texts.values():
        assert not set(text) & {chr(n) for n in (*range(10), *range(11, 32), *range(127, 160))}
    assert texts["table"].count("\n") == 1
    (_, *rows) = csv.reader(io.StringIO(texts["csv"]))
    assert texts["csv"].count("\n") == len(rows) + 1 == len(ESCAPES) + 1
    assert not [cell for row in rows for cell in (row[0], row[2]) if cell[0] in "=+-@"]
    (entry,) = json.loads(texts["json"])
    assert entry["image"] == source
    assert [name for name, _ in entry["classes"]] == ESCAPES, "a program gets what it is"


def test_the_password_of_an_address_is_kept_nowhere(tmp_path, monkeypatch):
    secret = "http://user:pa55word@127.0.0.1:9/cifar.tar.gz"
    data = cifar.CIFAR10DataModule(str(tmp_path), url=secret)
    assert data.url == secret, "it is used"
    assert data.hparams["url"] == "http://127.0.0.1:9/cifar.tar.gz"
    monkeypatch.chdir(tmp_path)
    cli = FitCLI(
        [
            "--model.weights=none",
            "--model.backbone=lenet5",
            f"--data.url={secret}",
            f"--data.root={tmp_path}",
        ]
    )
    assert cli.datamodule.url == secret
    assert "pa55word" not in cli.config_text
    assert "http://127.0.0.1:9" in cli.config_text
    assert "pa55word" not in str(check_recipe(tmp_path, [f"--data.url={secret}"]))
    said = without_password(
        "a: http://me:p@ss@host/x?y=1 b: https://token@host, c: http://host/a@b"
    )
    assert said == "a: http://host/x?y=1 b: https://host, c: http://host/a@b"


def test_fewer_processes_decode_where_few_files_may_be_open():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
        with pytest.warns(
            UserWarning, match="2 instead of 8 processes decode images, because `ulimit"
        ):
            assert workers_within(8, 1) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert workers_within(8, 1) == 8


def test_fewer_processes_decode_where_shared_memory_is_small(monkeypatch):
    """Docker's 64 MB, and batches of 256 images of 64 pixels; all files that one likes may be open."""
    monkeypatch.setattr(
        resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    )
    monkeypatch.setattr(loading.shutil, "disk_usage", lambda _: SimpleNamespace(free=64_000_000))
    with pytest.warns(UserWarning, match=r"3 instead of 8 processes .* /dev/shm has 64 MB"):
        assert workers_within(8, 3 * 64 * 64 * 256) == 3
    with pytest.warns(UserWarning, match="0 instead of 8 processes"):
        assert workers_within(8, 3 * 512 * 512 * 256) == 0


@pytest.mark.whole
def test_a_run_with_few_open_files_trains(tmp_path):
    write_images(tmp_path / "photos" / "train", 40)
    options = [
        "--model.backbone=lenet5",
        "--model.weights=none",
        "--data=ImageFolderDataModule",
        "--data.root=photos",
    ]
    options += [
        "--data.cache_limit_gb=0",
        "--data.num_workers=8",
        "--trainer.max_epochs=2",
        "--report.figures=false",
    ]
    command = f"ulimit -n 64; {sys.executable} -m cifar_transfer.fit {' '.join(options)} --trainer.accelerator=cpu"
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "instead of 8 processes decode images" in done.stderr


@pytest.mark.parametrize("shape", [(2, 4, 1, 1), (2, 4, 2, 2), (4, 2, 2)])
def test_a_dense_convolution_with_a_bias_is_a_convolution_in_half_precision_too(shape):
    torch.manual_seed(0)
    plain = torch.nn.Conv2d(4, 6, 3, padding=1)
    dense = torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3, padding=1))
    dense[0].load_state_dict(plain.state_dict())
    DenseConv2d.convert(dense)
    images = torch.rand(shape)
    with torch.autocast("cpu", torch.bfloat16):
        one, other = plain(images), dense(images)
    assert one.dtype == other.dtype == torch.bfloat16
    assert torch.allclose(one, other, atol=0.02)
    assert torch.allclose(plain(images), dense(images), atol=1e-6)


def bomb(kind):
    """A small image file that stands for a quarter of a gigabyte, or holds thousands of images."""
    out = io.BytesIO()
    image = Image.new("RGB", (8, 8), (200, 10, 10))
    if kind in ("GIF", "TIFF", "WEBP"):
        image.save(
            out,
            kind,
            save_all=True,
            append_images=[Image.new("RGB", (8, 8), (n, 0, 0)) for n in range(250)] * 4,
        )
        return out.getvalue()
    image.save(out, "PNG")
    png, packed = out.getvalue(), zlib.compress(bytes(2**28), 9)
    name, before = {
        "ICC profile": (b"iCCP", b"x\0\0"),
        "text": (b"zTXt", b"x\0\0"),
        "pixels": (b"IDAT", b""),
    }[kind]
    body = name + before + packed
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    at = png.index(b"IDAT") - 4
    return png[:at] + chunk + png[at:] if name != b"IDAT" else png[:at] + chunk + png[-12:]


@pytest.mark.parametrize("kind", ["ICC profile", "text", "pixels", "GIF", "TIFF", "WEBP"])
def test_small_files_that_stand_for_large_ones_take_no_memory(tmp_path, kind):
    path = tmp_path / "x.png"
    path.write_bytes(bomb(kind))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with suppress(UserError):
        assert read_image(path).shape == (3, 8, 8), "the first image"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "kilobytes"


def test_figures_of_a_thousand_classes_show_those_with_the_most_mistakes(tmp_path):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(2000) % 1000
    probabilities = (
        torch.nn.functional.one_hot(labels, 1000) * 0.5
        + torch.rand(2000, 1000, generator=generator) / 1000
    )
    probabilities[labels == 7] = probabilities[labels == 8]  # always mistaken
    images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    seen = Predictions(
        [f"class {n}" for n in range(1000)], labels, probabilities, torch.tensor([0]), images
    )
    for draw, words in ((plots.confusion, "most mistakes"), (plots.per_class, "lowest F1")):
        figure = draw(seen)
        names = [text.get_text() for text in figure.axes[0].get_yticklabels()]
        assert len(names) == plots.MAX_CLASSES
        assert {"class 7", "class 8"} <= set(names)
        assert any(
            f"100 of 1,000 classes with the {words}" in text.get_text()
            for text in figure.findobj(Text)
        )


def test_names_that_are_no_text_are_drawn_as_escapes():
    assert lettering(["a\nb", "\x1b[2J"]).texts == {"a\nb": r"a\nb", "\x1b[2J": r"\x1b[2J"}
