"""Datasets of others: given in Python, or torchvision's by name."""

import gzip
import hashlib
import struct
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import RUN, assert_same_weights, quiet_trainer, run_fit
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from test_data import batches, packed  # noqa: F401 # a fixture
from torch.utils.data import Dataset, Subset
from torchvision.datasets import MNIST, SVHN

from cifar_transfer import (
    ArrayImages,
    CIFAR10DataModule,
    DatasetDataModule,
    ImageDataModule,
    TorchvisionDataModule,
    TransferClassifier,
)
from cifar_transfer.base.errors import UserError
from cifar_transfer.commands.evaluate import evaluate
from cifar_transfer.data import library

NAMES = ["ant", "bee", "cat"]
PIXELS = np.random.default_rng(0).integers(0, 256, (60, 3, 32, 32), dtype=np.uint8)
LABELS = np.arange(60) % 3


class Pairs(Dataset):
    """A map-style dataset of pairs, with torchvision's attributes."""

    def __init__(self, images, labels=LABELS, **attributes):
        self.images = images
        self.labels_of_items = labels
        vars(self).update(attributes)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, row):
        return self.images[row], self.labels_of_items[row]


class ClassLabel:
    names = NAMES


class Rows(Pairs):
    """A dataset of mappings with columns, as Hugging Face's."""

    column_names = ("image", "label")
    features = {"image": None, "label": ClassLabel()}  # noqa: RUF012

    def __getitem__(self, row):
        if row == "label":
            return list(self.labels_of_items)
        return {"image": self.images[row], "label": self.labels_of_items[row]}


class Numbers(ImageDataModule):
    """The same images as arrays."""

    class_names = NAMES

    def load(self, split):
        return ArrayImages(PIXELS, LABELS) if split != "val" else None


def pictures():
    return [Image.fromarray(image.transpose(1, 2, 0)) for image in PIXELS]


FORMS = {
    "PIL images": lambda: Pairs(pictures(), classes=NAMES),
    "PIL images and targets": lambda: Pairs(pictures(), targets=LABELS.tolist(), classes=NAMES),
    "arrays [H, W, 3]": lambda: Pairs(PIXELS.transpose(0, 2, 3, 1), classes=NAMES),
    "tensors [3, H, W]": lambda: Pairs(torch.from_numpy(PIXELS), classes=NAMES),
    "tensors as labels": lambda: Pairs(PIXELS, torch.from_numpy(LABELS), classes=NAMES),
    "mappings": lambda: Rows(pictures()),
    "a subset": lambda: Subset(Pairs(pictures() * 2, [*LABELS] * 2, classes=NAMES), range(60)),
}


def trained(data, folder):
    torch.manual_seed(0)
    model = TransferClassifier("lenet5", "none", num_classes=data.num_classes)
    last = ModelCheckpoint(folder, save_last=True)
    quiet_trainer(max_epochs=1, callbacks=[last]).fit(model, data)
    return last.last_model_path


@pytest.mark.parametrize("form", FORMS)
def test_images_of_any_form_train_as_arrays_do(tmp_path, form):
    options = {"batch_size": 8, "num_workers": 0}
    dataset = FORMS[form]()
    data = DatasetDataModule(dataset, dataset, **options)
    assert data.class_names == NAMES
    expected = trained(Numbers(**options), tmp_path / "arrays")
    assert_same_weights(trained(data, tmp_path / "dataset"), expected)


def test_classes_without_names_are_numbers():
    data = DatasetDataModule(Pairs(pictures()))
    assert data.class_names == ["0", "1", "2"]
    assert DatasetDataModule(Pairs(pictures()), class_names=NAMES).class_names == NAMES


def test_labels_are_those_of_the_items():
    class Shifted(Pairs):
        def __getitem__(self, row):
            image, label = super().__getitem__(row)
            return image, (label + 1) % 3

    class Rare(Pairs):
        def __getitem__(self, row):
            image, label = super().__getitem__(row)
            return image, 2 if row == 17 else label

    shifted = Shifted(pictures(), targets=LABELS, classes=NAMES)
    rare = Rare(pictures(), targets=LABELS, classes=NAMES, target_transform=lambda label: label)
    expected = LABELS.copy()
    expected[17] = 2
    for dataset, labels in ((shifted, (LABELS + 1) % 3), (rare, expected)):
        data = DatasetDataModule(dataset, dataset)
        data.setup()
        assert data.images["test"].labels.tolist() == labels.tolist()


def test_a_transform_is_applied_in_each_epoch_and_other_images_are_read_once():
    class Changing(Pairs):
        reads = 0

        def __getitem__(self, row):
            self.reads += 1
            image, label = super().__getitem__(row)
            return image, label

    for attributes, again in (
        ({}, 0),
        ({"transform": lambda image: image}, 60),
        ({"format": {"type": "custom"}}, 60),
    ):
        dataset = Changing(PIXELS, targets=LABELS, **attributes)
        data = DatasetDataModule(dataset, batch_size=10, num_workers=0, class_names=NAMES)
        data.setup()
        before = dataset.reads
        for split in ("train", "val"):
            for row in range(len(data.images[split])):
                data.images[split][row]
        assert dataset.reads - before == again


def test_images_of_many_sizes_become_one():
    images = [Image.new("L", (40 + row, 90)) for row in range(60)]
    data = DatasetDataModule(Pairs(images), decode_size=24, class_names=NAMES)
    data.setup()
    assert data.images["train"][0][0].shape == (3, 24, 24)


WRONG = {
    "floats": (lambda: Pairs(PIXELS / 255), r"Item 0 of train has float64 \[3, 32, 32\].*ToTensor"),
    "text": (lambda: Pairs(["a"] * 60), "Item 0 of train has a str as its image: take a PIL image"),
    "no pairs": (lambda: [1, 2, 3], "Item 0 of train is a int, and no pair"),
    "other keys": (lambda: [{"img": 1, "label": 2}] * 9, "Item 0 of train has no 'image', but img"),
    "labels of floats": (
        lambda: Pairs(pictures(), LABELS / 2),
        r"Item 0 of train has the label .*0\.0.*: labels are whole numbers",
    ),
    "labels from 1": (
        lambda: Pairs(pictures(), LABELS + 1),
        "The train images have labels from 1 to 3, but the classes are numbered from 0 to 2",
    ),
    "a generator": (lambda: iter([]), "train is a list_iterator, and no map-style dataset"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_no_dataset_of_images_gets_a_sentence(wrong):
    dataset, words = WRONG[wrong]
    with pytest.raises(UserError, match=words):
        DatasetDataModule(dataset(), class_names=NAMES).setup()


def test_cifar10_of_torchvision_is_that_of_its_own_module(tmp_path, batches):  # noqa: F811
    files, _ = batches
    folder = tmp_path / "data" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    options = {"root": str(tmp_path / "data"), "batch_size": 8, "val_fraction": 0.3}
    own = CIFAR10DataModule(**options)
    by_name = TorchvisionDataModule("CIFAR10", **options)
    assert by_name.class_names == own.class_names
    assert by_name.statistics == own.statistics
    expected = trained(own, tmp_path / "own")
    assert_same_weights(trained(by_name, tmp_path / "by name"), expected)
    assert by_name.names == own.names


def idx(array):
    """Return an array in the format of MNIST's files, packed."""
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return gzip.compress(header + array.tobytes())


@pytest.fixture
def mnist(tmp_path, monkeypatch):
    """A server of small files of MNIST's names; their number is that of the requests."""
    rng = np.random.default_rng(1)
    folder = tmp_path / "served"
    folder.mkdir()
    resources = []
    for split, count in (("train", 80), ("t10k", 30)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        images = rng.integers(0, 50, (count, 28, 28), dtype=np.uint8)
        images[np.arange(count), labels] = 255
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            path = folder / f"{split}-{kind}-ubyte.gz"
            path.write_bytes(idx(array))
            resources.append((path.name, hashlib.md5(path.read_bytes()).hexdigest()))
    requests = []

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=folder)

        def log_message(self, *args):
            requests.append(args)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
    monkeypatch.setattr(MNIST, "resources", resources)
    yield requests
    server.shutdown()
    server.server_close()


def test_a_data_set_is_downloaded_once_and_its_grey_images_are_rgb(tmp_path, mnist):
    root = str(tmp_path / "data")
    data = TorchvisionDataModule("MNIST", root, batch_size=8)
    data.prepare_data()
    data.setup()
    requests = len(mnist)
    assert requests >= 4
    image, label = data.images["train"][3]
    assert image.shape == (3, 28, 28)
    assert torch.equal(image[0], image[2])
    assert image[0, label].min() == 255
    assert len(data.images["test"]) == 30
    again = TorchvisionDataModule("MNIST", root, batch_size=8)
    again.setup()
    assert len(mnist) == requests
    assert torch.equal(again.images["train"][3][0], image)


def test_a_data_set_that_cannot_be_had_gets_a_sentence(tmp_path, mnist, monkeypatch):
    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:1/"])
    with pytest.raises(UserError, match=r"MNIST is not in .*, and cannot be downloaded \("):
        TorchvisionDataModule("MNIST", str(tmp_path / "data")).prepare_data()
    with pytest.raises(UserError, match="name=ImageNet is unknown: take CIFAR10, CIFAR100, "):
        TorchvisionDataModule("ImageNet")


def test_a_package_that_a_data_set_needs_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    (tmp_path / "train_32x32.mat").write_bytes(b"")
    monkeypatch.setattr(SVHN, "_check_integrity", lambda self: True)
    with pytest.raises(UserError, match=r"^SVHN needs scipy.*: pip install scipy"):
        TorchvisionDataModule("SVHN", str(tmp_path)).prepare_data()


def test_a_data_set_in_a_folder_of_others_is_read(tmp_path, mnist, monkeypatch):
    root = str(tmp_path / "data")
    TorchvisionDataModule("MNIST", root).prepare_data()
    monkeypatch.setattr(library, "FileLock", pytest.fail)
    monkeypatch.setattr(library.os, "access", lambda path, mode: False)
    assert TorchvisionDataModule("MNIST", root).class_names[0] == "0 - zero"


def test_a_run_on_a_data_set_by_name_is_evaluated(tmp_path, mnist, monkeypatch):
    TorchvisionDataModule("MNIST", str(tmp_path / "data")).prepare_data()
    run_fit(
        tmp_path,
        "--data=TorchvisionDataModule",
        "--data.name=MNIST",
        "--data.batch_size=8",
        "--model.backbone=lenet5",
        "--model.weights=none",
        "--model.image_size=32",
        "--freeze.unfreeze_epoch=0",
        "--trainer.max_epochs=2",
        "--trainer.accelerator=cpu",
        "--report.figures=false",
    )
    monkeypatch.chdir(tmp_path)
    figures = evaluate(
        str(Path(RUN, "checkpoints", "best.ckpt")), "test", accelerator="cpu", figures=False
    )
    assert 0 <= figures["test/acc"] <= 1
