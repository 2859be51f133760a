"""Files that would hang the program, fill its memory, or make it say or delete anything."""

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
from cifar_transfer.commands.figures import figures
from cifar_transfer.commands.fit import fit
from cifar_transfer.data import cifar, loading
from cifar_transfer.data.cache import CACHE_FOLDER, cached
from cifar_transfer.data.images import ArrayImages, read_image, read_size
from cifar_transfer.data.loading import workers_within
from cifar_transfer.inference.prediction_formats import FORMATS
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
    """Return a copy of somebody's run, in the current folder."""
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


def with_writer(config, writer, folder):
    """Add a class that writes into a folder to a configuration."""
    options = {"save_dir" if writer == "CSVLogger" else "dirpath": str(folder)}
    entry = {"class_path": writer, "init_args": options}
    if writer == "SimpleProfiler":
        config["trainer"]["profiler"] = entry
    elif writer == "CSVLogger":
        config["trainer"]["logger"] = [entry]
    else:
        config["trainer"]["callbacks"] = [entry]
    return yaml.safe_dump(config)


@pytest.mark.parametrize("writer", ["CSVLogger", "SimpleProfiler"])
def test_a_resumed_configuration_writes_nowhere_else(others, tmp_path, writer):
    file = others / "config.yaml"
    config = yaml.safe_load(file.read_text())
    elsewhere = tmp_path / "elsewhere"
    file.write_text(with_writer(config, writer, elsewhere))
    message = f"has files written to {re.escape(str(elsewhere))}"
    with untouched(tmp_path), pytest.raises(UserError, match=message):
        fit([f"--resume={others}", "--trainer.max_epochs=2"])
    file.write_text(with_writer(config, writer, others / "more"))
    FitCLI([f"--resume={others}"]).folder.release()


def test_a_resumed_configuration_has_the_callbacks_of_its_run(others, tmp_path):
    file = others / "config.yaml"
    config = yaml.safe_load(file.read_text())
    file.write_text(with_writer(config, "ModelCheckpoint", tmp_path / "elsewhere"))
    message = r"^trainer.callbacks=\['ModelCheckpoint'\] differs from \[\]"
    with untouched(tmp_path), pytest.raises(UserError, match=message):
        fit([f"--resume={others}", "--trainer.max_epochs=2"])


# Name in the message; keys that lead to the field; its value.
TAMPERED = {
    "num_classes": ("num_classes", ["network", "num_classes"], -3),
    "class_names": ("class_names", ["network", "class_names"], [1, None, {}]),
    "patch_size": ("patch_size", ["network", "patch_size"], "large"),
    "input_side": ("geometry", ["network", "geometry", "input_side"], 60_000),
    "size": ("geometry", ["network", "geometry", "size"], [32, 60_000]),
    "size of zero": ("geometry", ["network", "geometry", "size"], [0, 0]),
    "unknown": ("geometry", ["network", "geometry", "run"], "rm"),
    "mean": ("geometry", ["network", "geometry", "mean"], [0.5, float("nan"), 0.5]),
    "std": ("geometry", ["network", "geometry", "std"], [0.5, 0, 0.5]),
    "global_step": ("global_step", ["global_step"], "\x1b[2J"),
    "averaged_steps": ("averaged_steps", ["averaged_steps"], -1),
}


@pytest.mark.parametrize(("name", "keys", "value"), TAMPERED.values(), ids=TAMPERED)
def test_fields_that_no_run_writes_are_refused_by_name(others, name, keys, value):
    path = others / "checkpoints" / "best.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    field = checkpoint
    for key in keys[:-1]:
        field = field[key]
    field[keys[-1]] = value
    torch.save(checkpoint, path)
    message = rf"best\.ckpt is damaged or was altered: its {name} cannot be"
    with pytest.raises(UserError, match=message) as raised:
        Classifier.load(path, "cpu")
    assert "\x1b" not in str(raised.value)


@pytest.mark.parametrize(
    ("part", "bad"),
    [("state_dict", torch.nan), ("state_dict", torch.inf), (RAW_STATE_KEY, torch.nan)],
)
def test_weights_that_are_nan_are_refused_instead_of_answering_nan(others, part, bad):
    path = others / "checkpoints" / "best.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    weights = {name: value.clone() for name, value in checkpoint["state_dict"].items()}
    name = next(name for name in weights if name.endswith("weight"))
    weights[name].fill_(bad)
    checkpoint[part] = weights
    torch.save(checkpoint, path)
    with pytest.raises(UserError, match=f"weights are NaN or infinite, first in {re.escape(name)}"):
        Classifier.load(path, "cpu")


@pytest.mark.parametrize("read", [read_image, read_size])
@pytest.mark.parametrize("is_link", [False, True])
def test_a_pipe_named_as_an_image_keeps_nobody_waiting(tmp_path, read, is_link):
    path = tmp_path / "x.png"
    make_pipe(path, is_link)
    with pytest.raises(UserError, match=r"x\.png cannot be read \(is no regular file\)"):
        read(path)


def make_pipe(path, is_link):
    if is_link:
        path.symlink_to(path.with_name("pipe"))
        path = path.with_name("pipe")
    os.mkfifo(path)


def test_a_pipe_among_images_is_left_out_and_a_link_to_one_is_refused(tmp_path):
    folder = tmp_path / "train"
    write_images(folder, 5)
    make_pipe(folder / "cat" / "x.png", is_link=False)
    ImageFolderDataModule(str(tmp_path)).prepare_data()
    make_pipe(folder / "dog" / "x.png", is_link=True)
    with pytest.raises(UserError, match="is no regular file"):
        ImageFolderDataModule(str(tmp_path)).prepare_data()


def two_images():
    return ArrayImages(np.zeros((2, 3, 4, 4), np.uint8), np.arange(2))


def test_nothing_but_our_own_files_is_removed_from_a_cache(tmp_path):
    folder = tmp_path / "data" / CACHE_FOLDER
    folder.mkdir(parents=True)
    other_names = [
        "train-holiday.jpg",
        "train-0123456789abcdef.npy.bak",
        "train-0123456789abcdef",
        ".train-notes",
    ]
    for name in other_names:
        (folder / name).write_text("mine")
    (folder / "train-fedcba9876543210.npy").mkdir()
    (folder / "train-aaaaaaaaaaaaaaaa.npy").symlink_to(folder / "train-holiday.jpg")
    before = {path.name for path in folder.iterdir()}
    stale = folder / "train-0123456789abcdef.npz"
    stale.write_text("ours")
    images = two_images()
    assert isinstance(cached(folder.parent, "train", 1, lambda: images), ArrayImages)
    assert before <= {path.name for path in folder.iterdir()}
    assert not stale.exists()


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """Return the folder of the user's own cache."""
    folder = tmp_path / "own"
    name = "cifar_transfer.data.cache.platformdirs.user_cache_path"
    monkeypatch.setattr(name, lambda application: folder / application)
    return folder


def test_a_link_is_no_cache(tmp_path, own_cache):
    folder = tmp_path / "data" / CACHE_FOLDER
    folder.parent.mkdir()
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    folder.symlink_to(theirs)
    cached(folder.parent, "train", 1, two_images)
    assert not list(theirs.iterdir())
    assert len(list(own_cache.rglob("*.npy"))) == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to somebody else")
def test_a_folder_that_others_write_into_is_no_cache(tmp_path, own_cache):
    folder = tmp_path / "data" / CACHE_FOLDER
    folder.mkdir(parents=True)
    os.chown(folder, 12345, 12345)
    folder.chmod(0o777)
    cached(folder.parent, "train", 1, two_images)
    assert not list(folder.iterdir())
    assert len(list(own_cache.rglob("*.npy"))) == 1


@pytest.mark.parametrize("kind", ["link", "folder"])
def test_what_is_no_lock_is_told(tmp_path, kind):
    folder = tmp_path / "data" / CACHE_FOLDER
    folder.mkdir(parents=True)
    lock = folder / "train.lock"
    if kind == "folder":
        lock.mkdir()
    else:
        lock.symlink_to(tmp_path / "elsewhere")
    images = two_images()
    with pytest.warns(UserWarning, match=r"not cached .*train\.lock cannot be locked"):
        assert cached(folder.parent, "train", 1, lambda: images) is images
    assert not (tmp_path / "elsewhere").exists()


def test_a_folder_in_the_place_of_the_cache_is_told(tmp_path):
    folder = tmp_path / "data" / CACHE_FOLDER
    folder.parent.mkdir()
    cached(folder.parent, "train", 1, two_images)
    (pixels,) = folder.glob("*.npy")
    pixels.unlink()
    pixels.mkdir()
    with pytest.warns(UserWarning, match="are damaged|not cached"):
        assert len(cached(folder.parent, "train", 1, two_images)) == 2


# Class names that a terminal or a spreadsheet would act on.
ESCAPES = ["=HYPERLINK(1)", "a\nb", "\x1b[2Jred", "\x9bgreen", "+1", "@sum", "-2"]
CONTROL_CHARACTERS = {chr(code) for code in (*range(10), *range(11, 32), *range(127, 160))}


def test_no_name_steers_a_terminal_forges_a_row_or_is_executed():
    source = "folder/\x1b]0;title\x07\nfile.png"
    prediction = ImagePrediction(source, None, [(name, 0.1) for name in ESCAPES])
    texts = {}
    for name, form in FORMATS.items():
        texts[name] = "".join(form([prediction], ESCAPES))
        assert not set(texts[name]) & CONTROL_CHARACTERS
    assert texts["table"].count("\n") == 1
    assert texts["csv"].count("\n") == 2
    _heading, row = csv.reader(io.StringIO(texts["csv"]))
    assert len(row) == 1 + 2 * len(ESCAPES)
    for cell in row:
        assert cell[0] not in "=+-@"
    (entry,) = json.loads(texts["json"])
    assert entry["image"] == source
    assert [name for name, _ in entry["classes"]] == ESCAPES, "programs get the names themselves"


def test_the_password_of_an_address_is_kept_nowhere(tmp_path, monkeypatch):
    url = "http://user:pa55word@127.0.0.1:9/cifar.tar.gz"
    data = cifar.CIFAR10DataModule(str(tmp_path), url=url)
    assert data.url == url, "it is used"
    assert data.hparams["url"] == "http://127.0.0.1:9/cifar.tar.gz"
    monkeypatch.chdir(tmp_path)
    options = [
        "--model.weights=none",
        "--model.backbone=lenet5",
        f"--data.url={url}",
        f"--data.root={tmp_path}",
    ]
    cli = FitCLI(options)
    assert cli.datamodule.url == url
    assert "pa55word" not in cli.config_text
    assert "http://127.0.0.1:9" in cli.config_text
    assert "pa55word" not in str(check_recipe(tmp_path, [f"--data.url={url}"]))


def test_passwords_are_removed_from_texts():
    text = "a: http://me:p@ss@host/x?y=1 b: https://token@host, c: http://host/a@b"
    without = "a: http://host/x?y=1 b: https://host, c: http://host/a@b"
    assert without_password(text) == without


def test_fewer_processes_decode_where_few_files_may_be_open():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    message = "2 instead of 8 processes decode images, because `ulimit"
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
        with pytest.warns(UserWarning, match=message):
            assert workers_within(8, 1) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert workers_within(8, 1) == 8


def test_fewer_processes_decode_where_shared_memory_is_small(monkeypatch):
    """Docker's 64 MB, for batches of 256 images; any number of files may be open."""
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: unlimited)
    monkeypatch.setattr(loading.shutil, "disk_usage", lambda path: SimpleNamespace(free=64_000_000))
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
        "--data.cache_limit_gb=0",
        "--data.num_workers=8",
        "--trainer.max_epochs=2",
        "--trainer.accelerator=cpu",
        "--report.figures=false",
    ]
    command = f"ulimit -n 64; {sys.executable} -m cifar_transfer.fit {' '.join(options)}"
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
    assert torch.allclose(plain(images), dense(images), atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        expected = plain(images)
        logits = dense(images)
    assert logits.dtype == expected.dtype == torch.bfloat16
    assert torch.allclose(logits, expected, atol=0.02)


# Chunks of PNG, and what comes before the compressed bytes in them.
PNG_CHUNKS = {
    "ICC profile": (b"iCCP", b"x\0\0"),
    "text": (b"zTXt", b"x\0\0"),
    "pixels": (b"IDAT", b""),
}


def bomb(kind):
    """Return a small image file of a quarter of a gigabyte unpacked, or of a thousand frames."""
    file = io.BytesIO()
    image = Image.new("RGB", (8, 8), (200, 10, 10))
    if kind not in PNG_CHUNKS:
        frames = [Image.new("RGB", (8, 8), (red, 0, 0)) for red in range(250)]
        image.save(file, kind, save_all=True, append_images=frames * 4)
        return file.getvalue()
    image.save(file, "PNG")
    png = file.getvalue()
    name, before = PNG_CHUNKS[kind]
    content = name + before + zlib.compress(bytes(2**28), 9)
    chunk = struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content))
    start = png.index(b"IDAT") - 4
    if kind == "pixels":
        return png[:start] + chunk + png[-12:]
    return png[:start] + chunk + png[start:]


@pytest.mark.parametrize("kind", [*PNG_CHUNKS, "GIF", "TIFF", "WEBP"])
def test_small_files_that_stand_for_large_ones_take_no_memory(tmp_path, kind):
    path = tmp_path / "x.png"
    path.write_bytes(bomb(kind))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with suppress(UserError):
        assert read_image(path).shape == (3, 8, 8), "the first frame"
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert kilobytes < 100_000


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
        [f"class {n}" for n in range(1000)], labels, probabilities.log(), torch.tensor([0]), images
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
    letters = lettering(["a\nb", "\x1b[2J"])
    assert letters.text("a\nb") == r"a\nb"
    assert letters.text("\x1b[2J") == r"\x1b[2J"
