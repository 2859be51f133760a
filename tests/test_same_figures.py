"""The same images in whatever form they come give the same figures, to the last digit."""

import csv
import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import SHARED, assert_same_weights, quiet_trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from test_datasets import ClassLabel, Pairs, Rows
from torchvision.datasets import CIFAR10

from cifar_transfer import (
    ArrayImages,
    DatasetDataModule,
    FileImages,
    ImageDataModule,
    ImageFolderDataModule,
    ShapesDataModule,
    TableDataModule,
    TorchvisionDataModule,
    TransferClassifier,
)
from cifar_transfer.data.cifar import CLASSES

# Validation is on the test images: what is held out by a hash would depend on the names.
OPTIONS: dict[str, Any] = {"batch_size": 16, "val_fraction": 0, "num_workers": 0}
PER_CLASS = 8


class Split(NamedTuple):
    """The files of a split in their order, with labels and pixels, uint8 [N, 32, 32, 3]."""

    paths: list[str]
    labels: list[int]
    pixels: np.ndarray

    def pictures(self):
        return [Image.fromarray(image) for image in self.pixels]


Splits = dict[str, Split]


def flat_folder(folder: Path) -> ImageFolderDataModule:
    return ImageFolderDataModule(str(folder), **OPTIONS)


def tables(folder: Path, splits: Splits) -> TableDataModule:
    for name, split in splits.items():
        with (folder / f"{name}.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["label", "image"])
            for path, label in zip(split.paths, split.labels, strict=True):
                table.writerow([CLASSES[label], Path(path).relative_to(folder)])
    return TableDataModule("train.csv", test="test.csv", tables=str(folder), **OPTIONS)


class Own(ImageDataModule):
    """A data module as users write one."""

    class_names = CLASSES

    def __init__(self, splits: Splits, images: Callable[[Split], ArrayImages | FileImages]) -> None:
        super().__init__(**OPTIONS)
        self.own = {name: images(split) for name, split in splits.items()}

    def load(self, split):
        return self.own.get(split)


def files(folder: Path, splits: Splits) -> Own:
    return Own(splits, lambda split: FileImages(split.paths, split.labels))


def arrays(folder: Path, splits: Splits) -> Own:
    def images(split: Split) -> ArrayImages:
        return ArrayImages(split.pixels.transpose(0, 3, 1, 2), np.array(split.labels))

    return Own(splits, images)


def pil_images(folder: Path, splits: Splits) -> DatasetDataModule:
    datasets: dict[str, Any] = {
        name: Pairs(split.pictures(), split.labels, classes=CLASSES)
        for name, split in splits.items()
    }
    return DatasetDataModule(**datasets, **OPTIONS)


class CIFARLabel(ClassLabel):
    names = list(CLASSES)  # noqa: RUF012


class CIFARRows(Rows):
    """A dataset as Hugging Face's is, of mappings."""

    features = {"image": None, "label": CIFARLabel()}  # noqa: RUF012


def mappings(folder: Path, splits: Splits) -> DatasetDataModule:
    datasets: dict[str, Any] = {}
    for name, split in splits.items():
        datasets[name] = CIFARRows(split.pictures(), split.labels)
    return DatasetDataModule(**datasets, **OPTIONS)


def batches_of_torchvision(folder: Path, splits: Splits) -> TorchvisionDataModule:
    """Write the splits in CIFAR-10's own format, of which torchvision is told the sums."""
    root = folder / "batches"
    place = root / CIFAR10.base_folder
    place.mkdir(parents=True)
    meta = pickle.dumps({"label_names": list(CLASSES)}, protocol=2)
    (place / "batches.meta").write_bytes(meta)
    CIFAR10.meta = CIFAR10.meta | {"md5": hashlib.md5(meta).hexdigest()}
    for attribute, split in (("train_list", splits["train"]), ("test_list", splits["test"])):
        entries = []
        names = [name for name, _ in getattr(CIFAR10, attribute)]
        rows_of_files = np.array_split(np.arange(len(split.labels)), len(names))
        for name, rows in zip(names, rows_of_files, strict=True):
            pixels = split.pixels[rows].transpose(0, 3, 1, 2).reshape(len(rows), -1)
            labels = [split.labels[row] for row in rows]
            content = pickle.dumps({"data": pixels, "labels": labels}, protocol=2)
            (place / name).write_bytes(content)
            entries.append([name, hashlib.md5(content).hexdigest()])
        setattr(CIFAR10, attribute, entries)
    return TorchvisionDataModule("CIFAR10", root=str(root), **OPTIONS)


FORMS = {
    "tables": tables,
    "files": files,
    "arrays": arrays,
    "PIL images": pil_images,
    "mappings": mappings,
    "torchvision's class": batches_of_torchvision,
}


class Fit(NamedTuple):
    figures: dict[str, float]
    checkpoint: str


def fitted(data: ImageDataModule, folder: Path) -> Fit:
    """Train two epochs, and test."""
    torch.manual_seed(0)
    model = TransferClassifier("lenet5", "none", num_classes=10, normalize="cifar10")
    last = ModelCheckpoint(folder, save_last=True)
    trainer = quiet_trainer(max_epochs=2, callbacks=[last])
    trainer.fit(model, data)
    figures = {name: float(value) for name, value in trainer.callback_metrics.items()}
    trainer.test(model, data, verbose=False)
    figures |= {name: float(value) for name, value in trainer.callback_metrics.items()}
    # Of a held-out split the classes of its source count, whether these are given or not.
    for name in ("test/balanced_accuracy", "test/macro_f1"):
        figures.pop(name, None)
    return Fit(figures, last.last_model_path)


def write_drawn(folder: Path) -> None:
    """Write drawn images of ten kinds, with the names of CIFAR-10's classes."""
    shapes = ShapesDataModule(train_images=40, test_images=10 * PER_CLASS)
    shapes.setup()
    images = shapes.images["test"]
    for row in range(len(images)):
        image, label = images[row]
        path = folder / CLASSES[label] / f"{row:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)


def write_real(folder: Path) -> None:
    """Write the first images of each class of the real CIFAR-10."""
    labels = np.load(SHARED / "cifar10" / "labels.npz")["train"]
    with Image.open(SHARED / "cifar10" / "train-00.webp") as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for row in np.flatnonzero(labels[:1000] == label)[:PER_CLASS].tolist():
            top, left = 32 * (row // 40), 32 * (row % 40)
            image = Image.fromarray(pixels[top : top + 32, left : left + 32])
            image.save(folder / name / f"{row:03d}.png")


@pytest.mark.filterwarnings("ignore:val_fraction=0")
@pytest.mark.parametrize("images", ["drawn", pytest.param("real", marks=pytest.mark.slow)])
def test_the_same_images_in_any_form_give_the_same_figures(tmp_path, images, monkeypatch):
    for attribute in ("meta", "train_list", "test_list"):
        monkeypatch.setattr(CIFAR10, attribute, getattr(CIFAR10, attribute))
    if images == "real" and not SHARED.is_dir():
        pytest.skip(f"real images are not at hand in {SHARED}")
    folder = tmp_path / "photos"
    write = write_real if images == "real" else write_drawn
    write(folder)
    data = flat_folder(folder)
    expected = fitted(data, tmp_path / "folder")
    assert {"train/loss_epoch", "val/loss", "test/acc"} <= expected.figures.keys()
    splits = {}
    for name in ("train", "test"):
        names = [name.partition("/")[2] for name in data.names_of_images(name)]
        shard = data.images[name]
        pixels = np.stack([shard[row][0].permute(1, 2, 0).numpy() for row in range(len(shard))])
        splits[name] = Split([str(folder / name) for name in names], shard.labels.tolist(), pixels)
    assert len(splits["train"].paths) > 40
    assert len(splits["test"].paths) >= 10
    for name, form in FORMS.items():
        result = fitted(form(folder, splits), tmp_path / name)
        assert result.figures == expected.figures, name
        assert_same_weights(result.checkpoint, expected.checkpoint)
