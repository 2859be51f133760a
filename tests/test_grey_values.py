"""Files of more than 8 bits: one range of grey values for a data set and its checkpoints."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import quiet_trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

from cifar_transfer import Classifier, DatasetDataModule, ImageFolderDataModule, TransferClassifier
from cifar_transfer.base.errors import UserError
from cifar_transfer.commands.evaluate import evaluate
from cifar_transfer.data import files
from cifar_transfer.data.cache import CACHE_FOLDER
from cifar_transfer.data.geometry import Geometry
from cifar_transfer.data.grey_values import Extremes, describe_range, range_of
from cifar_transfer.data.images import read_image
from cifar_transfer.data.labelled_folder import LabelledFolder
from cifar_transfer.data.module import EarlierRun

GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)
KINDS = {
    "8 bits in 16": ("png", GREY.astype(np.uint16), (0, 255)),
    "10 bits in 16": ("tif", GREY.astype(np.uint16) * 4 + 3, (0, 1023)),
    "12 bits in 16": ("png", (GREY * 16.0588).astype(np.uint16) + 1, (0, 4095)),
    "16 bits": ("png", GREY.astype(np.uint16) * 257, (0, 65535)),
    "20 bits in 32": ("tif", GREY.astype(np.int32) * 4112, (0, 2**20 - 1)),
    "negative": ("tif", GREY.astype(np.int32) * 10 - 1000, (-1000, 1550)),
    "floats to 1": ("tif", GREY.astype(np.float32) / 255, (0, 1)),
    "floats to 255": ("tif", GREY.astype(np.float32), (0, 255)),
    "4 bits in 16": ("png", (GREY // 17).astype(np.uint16), (0, 15)),
    "floats to 16": ("tif", GREY.astype(np.float32) * 16 / 255, (0, 16)),
    "other floats": ("tif", GREY.astype(np.float32) * 20 - 100, (-100, 5000)),
}


def write(root, ending, values):
    """Write images of values into two classes; those of all but one file are darker."""
    shift = 0
    for split, count in (("train", 6), ("test", 2)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for row in range(count):
                is_bright = (split, name, row) == ("train", "dog", 3)
                black = values.min()
                scaled = black + (values - black) / (1 if is_bright else 4)
                image = np.roll(scaled.astype(values.dtype), shift)
                Image.fromarray(image).save(root / split / name / f"{row}.{ending}")
                shift += 1


BRIGHT = np.roll(GREY, 9)  # train/dog/3
DARK = np.roll(GREY // 4, 12)  # test/cat/0


def ready(root, **options):
    data = ImageFolderDataModule(str(root), val_fraction=0.3, **options)
    data.prepare_data()
    data.setup()
    return data


@pytest.mark.parametrize("kind", KINDS)
def test_one_range_serves_all_files_of_a_data_set(tmp_path, kind, caplog):
    ending, values, expected = KINDS[kind]
    write(tmp_path, ending, values)
    data = ready(tmp_path)
    assert data.grey_range == pytest.approx(expected)
    assert f"{describe_range(data.grey_range)}." in caplog.text
    train = data.load("train")
    bright = train.pixels(np.array([9]))
    tolerance = 17 if kind == "4 bits in 16" else 1
    assert np.abs(bright[0, 0].astype(int) - BRIGHT).max() <= tolerance
    dark = data.images["test"].pixels(np.array([0]))
    assert np.abs(dark[0, 0].astype(int) - DARK).max() <= tolerance, "not stretched by itself"


def test_new_images_have_the_range_of_the_training(tmp_path):
    """`evaluate --root` scores a folder of test images alone, which may all be dark."""
    ending, values, _ = KINDS["12 bits in 16"]
    write(tmp_path, ending, values)
    geometry = Geometry((16, 16), None, (0.5,) * 3, (0.2,) * 3, grey_range=(0, 4095))
    data = LabelledFolder(tmp_path / "test", ["cat", "dog"], geometry)
    data.prepare_data()
    data.setup("test")
    dark = data.images["test"].pixels(np.array([0]))
    assert np.abs(dark[0, 0].astype(int) - DARK).max() <= 1


def test_without_training_images_a_size_is_asked_for(tmp_path):
    write(tmp_path, "png", GREY)
    shutil.rmtree(tmp_path / "train")
    data = ImageFolderDataModule(str(tmp_path))
    with pytest.raises(UserError, match=r"has no training images, .* give decode_size\."):
        data.setup("test")


@pytest.mark.parametrize("kind", ["12 bits in 16", "floats to 16"])
def test_a_dataset_in_python_has_one_range_too(kind, caplog):
    _, values, expected = KINDS[kind]
    images = []
    for row in range(12):
        darker = values if row == 7 else (values / 4).astype(values.dtype)
        images.append((Image.fromarray(darker), row % 2))
    data = DatasetDataModule(images, images[:2], images[7:8], class_names=["cat", "dog"])
    data.setup()
    assert data.grey_range == pytest.approx(expected)
    assert caplog.text.count(describe_range(expected)) == 1
    bright, _ = data.images["val"][0]
    assert np.abs(bright[0].numpy().astype(int) - GREY).max() <= 1
    dark, _ = data.images["test"][0]
    assert np.abs(dark[0].numpy().astype(int) - GREY // 4).max() <= 1


def test_images_of_8_bits_have_no_range_and_are_not_read_for_it(tmp_path, monkeypatch):
    write(tmp_path, "png", GREY)
    monkeypatch.setattr("cifar_transfer.data.grey_values.extremes_of", pytest.fail)
    assert ready(tmp_path).grey_range is None
    assert not list((tmp_path / CACHE_FOLDER).glob("*.json"))


def test_the_range_is_found_out_once(tmp_path, monkeypatch):
    ending, values, expected = KINDS["12 bits in 16"]
    write(tmp_path, ending, values)
    assert ready(tmp_path).grey_range == expected
    (path,) = (tmp_path / CACHE_FOLDER).glob("*grey.json")
    with monkeypatch.context() as patch:
        patch.setattr(files, "find_grey_range", pytest.fail)
        assert ready(tmp_path).grey_range == expected
    for content in ("rubbish", json.dumps({"key": json.loads(path.read_text())["key"]})):
        path.write_text(content)
        assert ready(tmp_path).grey_range == expected
    Image.fromarray(values * 2).save(tmp_path / "train" / "cat" / f"new.{ending}")
    assert ready(tmp_path).grey_range == (0, 8191)


def test_a_run_that_continues_keeps_its_range(tmp_path):
    ending, values, expected = KINDS["12 bits in 16"]
    write(tmp_path, ending, values * 2)
    data = ImageFolderDataModule(str(tmp_path))
    data.continue_from(EarlierRun(size=(16, 16), grey_range=expected))
    data.setup()
    assert data.grey_range == expected
    later = ready(tmp_path)
    assert later.grey_range == (0, 8191)
    later.continue_from(EarlierRun(grey_range=expected))
    assert later.grey_range == expected
    assert later.images["train"].pixels(np.array([0])).max() > 0
    without = ImageFolderDataModule(str(tmp_path))
    without.continue_from(EarlierRun(size=(16, 16)))
    with pytest.warns(UserWarning, match="nearly black"):
        without.setup()
    assert without.grey_range is None


def test_floats_among_whole_numbers_are_refused():
    whole = Extremes(0, 4095, are_floats=False)
    with pytest.raises(UserError, match="1 have floats as grey values, and 2 whole numbers: store"):
        range_of([whole, Extremes(0, 1, are_floats=True), whole])
    assert range_of([]) is None
    assert range_of([Extremes(0, 0, are_floats=False)] * 2) == (0, 1), "all black"


def test_what_is_no_number_is_black(tmp_path):
    values = GREY.astype(np.float32)
    values[0, :3] = [np.nan, np.inf, -np.inf]
    Image.fromarray(values).save(tmp_path / "x.tif")
    image = read_image(tmp_path / "x.tif", grey_range=(0, 255))
    assert image[0, 0, :5].tolist() == [0, 255, 0, 3, 4]
    with pytest.raises(UserError, match="its pixels are floats, whose range is not known"):
        read_image(tmp_path / "x.tif")


def test_a_geometry_tells_other_programs_of_the_range():
    geometry = Geometry((16, 16), None, (0.5,) * 3, (0.5,) * 3, grey_range=(0, 4095))
    description = geometry.describe(inside=True)
    assert "more than 8 bits from 0 to 4095 onto those from 0 to 255" in description["preparation"]
    assert description["geometry"]["grey_range"] == [0, 4095]
    plain = replace(geometry, grey_range=None).describe(inside=True)
    assert "grey values" not in plain["preparation"]


def test_a_checkpoint_predicts_and_evaluates_by_its_range(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    ending, values, expected = KINDS["12 bits in 16"]
    write(tmp_path / "photos", ending, values)
    data = ImageFolderDataModule("photos", batch_size=4)
    model = TransferClassifier("lenet5", "none", num_classes=2, image_size=32)
    last = ModelCheckpoint(tmp_path, save_last=True)
    quiet_trainer(max_epochs=1, callbacks=[last]).fit(model, data)
    assert caplog.text.count("Grey values from 0 to 4,095, which the training images use") == 1
    ckpt = last.last_model_path
    stored = torch.load(ckpt, weights_only=True)["network"]["geometry"]["grey_range"]
    assert stored == list(expected)
    classifier = Classifier.load(ckpt, "cpu")
    paths = sorted((tmp_path / "photos" / "test").glob("*/*"))
    predictions = list(classifier.stream(paths))
    for path, prediction in zip(paths, predictions, strict=True):
        assert np.array_equal(
            prediction.pixels, read_image(path, classifier.size, grey_range=expected)
        )
        with Image.open(path) as picture:
            seen = next(classifier.stream([picture])).pixels
            assert np.array_equal(seen, prediction.pixels)
    correct = [
        p.classes[0][0] == path.parent.name for path, p in zip(paths, predictions, strict=True)
    ]
    scores = evaluate(ckpt, accelerator="cpu", figures=False)
    assert scores["test/acc"] == pytest.approx(np.mean(correct))


def test_images_of_one_colour_are_counted_and_named(tmp_path, caplog):
    write(tmp_path, "png", GREY)
    for row, name in ((1, "cat"), (4, "dog"), (5, "dog")):
        Image.new("RGB", (16, 16), (9, row, 7)).save(tmp_path / "train" / name / f"{row}.png")
    almost = Image.new("RGB", (16, 16), "red")
    almost.putpixel((3, 5), (254, 0, 0))
    almost.save(tmp_path / "test" / "cat" / "0.png")
    ready(tmp_path)
    told = re.findall(
        r"(\d) of (\d) (\w+) images have one colour all over, such as (.*):", caplog.text
    )
    assert sum(int(count) for count, *_ in told) == 3
    assert {split for *_, split, _ in told} <= {"train", "val"}
    assert {name for *_, names in told for name in names.split(", ")} <= {
        "cat/1.png",
        "dog/4.png",
        "dog/5.png",
    }
