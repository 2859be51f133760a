"""From files to batches: decoding, caching and splitting of every source; messages for bad data."""

import hashlib
import io
import pickle
import re
import shutil
import tarfile
import warnings
from dataclasses import fields
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from broken_server import BrokenServer
from conftest import quiet_trainer, write_images
from lightning.pytorch import Callback
from PIL import Image
from torchvision.datasets import CIFAR10

from cifar_transfer import (
    Augment,
    CIFAR10DataModule,
    ImageFolderDataModule,
    ShapesDataModule,
    TransferClassifier,
)
from cifar_transfer.base import download
from cifar_transfer.base.errors import UserError
from cifar_transfer.data import cifar, splits
from cifar_transfer.data.augment import step_seed
from cifar_transfer.data.cache import CACHE_FOLDER
from cifar_transfer.data.images import read_image

PER_BATCH = 30


@pytest.fixture
def batches(monkeypatch):
    """Small files in the official layout, and their MD5 sums in place of the official ones.

    Returns the content of each file by its name, and the archive.
    """
    rng = np.random.default_rng(0)
    files = {"batches.meta": pickle.dumps({"label_names": list(cifar.CLASSES)}, protocol=2)}
    for attribute in ("train_list", "test_list"):
        entries = []
        for name, _ in getattr(CIFAR10, attribute):
            pixels = rng.integers(0, 256, (PER_BATCH, 3072), dtype=np.uint8)
            labels = [row % 10 for row in range(PER_BATCH)]
            files[name] = pickle.dumps({"data": pixels, "labels": labels}, protocol=2)
            entries.append([name, hashlib.md5(files[name]).hexdigest()])
        monkeypatch.setattr(CIFAR10, attribute, entries)
    meta_md5 = hashlib.md5(files["batches.meta"]).hexdigest()
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": meta_md5})
    archive = packed(files)
    monkeypatch.setattr(cifar, "ARCHIVE_MD5", hashlib.md5(archive).hexdigest())
    return files, archive


def packed(files):
    """Return an archive of files as CIFAR-10's."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        for name, file_content in files.items():
            info = tarfile.TarInfo(f"{cifar.BATCHES}/{name}")
            info.size = len(file_content)
            archive.addfile(info, io.BytesIO(file_content))
    return content.getvalue()


def put_batches(root, files):
    (root / cifar.BATCHES).mkdir(parents=True)
    for name, content in files.items():
        (root / cifar.BATCHES / name).write_bytes(content)


def ready(data):
    data.prepare_data()
    data.setup()
    return data


def batch_pixels(files, name):
    return pickle.loads(files[name])["data"].reshape(-1, 3, 32, 32)


def test_batches_are_read_whole_and_in_order(tmp_path, batches):
    put_batches(tmp_path, batches[0])
    data = CIFAR10DataModule(str(tmp_path))
    data.prepare_data()
    train = data.load("train")
    assert len(train) == 5 * PER_BATCH
    for part, (name, _) in enumerate(CIFAR10.train_list):
        images, labels = train.__getitems__(list(range(part * PER_BATCH, (part + 1) * PER_BATCH)))
        assert np.array_equal(images.numpy(), batch_pixels(batches[0], name))
        assert labels.tolist() == [i % 10 for i in range(PER_BATCH)]


def test_batches_are_preferred_to_the_archive_and_the_archive_to_an_image_folder(tmp_path, batches):
    files, archive = batches
    for split in ("train", "test"):
        write_images(tmp_path / split, 5, classes=cifar.CLASSES)
    from_folder = ready(CIFAR10DataModule(str(tmp_path)))
    assert len(from_folder.images["test"]) == 50
    (tmp_path / cifar.ARCHIVE).write_bytes(archive)
    from_archive = ready(CIFAR10DataModule(str(tmp_path)))
    first_image, _ = from_archive.images["test"][0]
    assert np.array_equal(first_image.numpy(), batch_pixels(files, "test_batch")[0])
    put_batches(tmp_path, files)
    (tmp_path / cifar.ARCHIVE).write_bytes(b"not read")
    from_batches = ready(CIFAR10DataModule(str(tmp_path)))
    assert len(from_batches.images["test"]) == PER_BATCH


def test_an_archive_leaves_no_unpacked_files(tmp_path, batches, monkeypatch):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    (tmp_path / cifar.ARCHIVE).write_bytes(batches[1])
    CIFAR10DataModule(str(tmp_path)).prepare_data()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        CACHE_FOLDER,
        cifar.ARCHIVE,
        "temporary",
    ]
    assert not list(temporary.iterdir())


class Bomb:
    def __reduce__(self):
        return open, ("bomb-went-off", "w")


@pytest.mark.parametrize("name", ["data_batch_3", "batches.meta", cifar.ARCHIVE])
def test_a_pickle_that_is_not_the_official_one_is_never_opened(
    tmp_path, batches, name, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    files, _ = batches
    if name == cifar.ARCHIVE:
        (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    else:
        put_batches(tmp_path, files | {name: pickle.dumps(Bomb())})
    with pytest.raises(UserError, match=rf"{name} is not the official file, so it is not opened"):
        CIFAR10DataModule(str(tmp_path)).prepare_data()
    assert not (tmp_path / "bomb-went-off").exists()


@pytest.mark.parametrize("name", ["data_batch_4", "test_batch", "batches.meta"])
def test_a_missing_file_of_the_batches_is_named(tmp_path, batches, name):
    put_batches(tmp_path, batches[0])
    (tmp_path / cifar.BATCHES / name).unlink()
    with pytest.raises(UserError, match=rf"{name} is missing: complete {cifar.BATCHES}, or remove"):
        CIFAR10DataModule(str(tmp_path)).prepare_data()


def test_missing_images_are_downloaded_once(tmp_path, batches, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with BrokenServer(files={f"/{cifar.ARCHIVE}": batches[1]}) as server:
        for _ in range(2):
            data = ready(CIFAR10DataModule(str(tmp_path), url=server.url(f"/{cifar.ARCHIVE}")))
    assert len(data.images["test"]) == PER_BATCH
    assert (tmp_path / cifar.ARCHIVE).read_bytes() == batches[1]


def test_a_trickling_mirror_of_cifar10_is_left_for_the_next(tmp_path, batches, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(download, "SECONDS_BEFORE_NEXT", 0.5)
    path = f"/{cifar.ARCHIVE}"
    with BrokenServer(files={path: batches[1]}) as server:
        monkeypatch.setattr(cifar, "MIRRORS", (server.url(f"/trickle{path}"), server.url(path)))
        ready(CIFAR10DataModule(str(tmp_path)))
    assert (tmp_path / cifar.ARCHIVE).read_bytes() == batches[1]


def test_the_official_host_of_cifar10_which_may_trickle_is_asked_last():
    assert cifar.MIRRORS[-1] == CIFAR10.url
    assert len(cifar.MIRRORS) > 1


def test_without_a_network_the_message_gives_three_ways_out(tmp_path):
    with pytest.raises(UserError, match=r"--data\.url=URL.*yourself.*make demo"):
        CIFAR10DataModule(str(tmp_path), url="http://127.0.0.1:9/x").prepare_data()


def test_val_fraction_zero_validates_on_the_test_images_and_warns_of_it():
    data = ShapesDataModule(train_images=50, test_images=20, val_fraction=0)
    with pytest.warns(UserWarning, match="not clean"):
        ready(data)
    assert len(data.images["train"]) == 50
    assert data.images["val"] is data.images["test"]


def test_a_folder_is_decoded_once_and_again_when_it_changes(tmp_path, monkeypatch):
    write_images(tmp_path / "train", 300, size=(12, 10))  # more than one batch of the decoder
    data = ready(ImageFolderDataModule(str(tmp_path)))
    train = data.load("train")
    assert (len(train), data.image_size, data.class_names) == (600, (10, 12), ["cat", "dog"])
    for row in (0, 255, 256, 299, 300, 599):
        path = tmp_path / "train" / ("cat" if row < 300 else "dog") / f"{row % 300:03d}.png"
        assert np.array_equal(train[row][0].numpy(), read_image(path)), row
        assert int(train[row][1]) == row // 300
    cache = sorted((tmp_path / CACHE_FOLDER).glob("train-*"))
    stamp = [path.stat().st_mtime_ns for path in cache]
    ready(ImageFolderDataModule(str(tmp_path)))
    assert [path.stat().st_mtime_ns for path in cache] == stamp
    Image.new("RGB", (12, 10), "red").save(tmp_path / "train" / "cat" / "000.png")
    assert ready(ImageFolderDataModule(str(tmp_path))).load("train")[0][0][0].unique().tolist() == [
        255
    ]
    assert len(list((tmp_path / CACHE_FOLDER).glob("train-*"))) == 2, "the old cache is gone"


def test_a_cache_cut_short_is_made_again(tmp_path):
    write_images(tmp_path / "train", 10)
    whole = ready(ImageFolderDataModule(str(tmp_path))).load("train")[7][0]
    (cache,) = (tmp_path / CACHE_FOLDER).glob("train-*.npy")
    cache.write_bytes(cache.read_bytes()[:500])
    with pytest.warns(UserWarning, match="are damaged, and are made again"):
        data = ready(ImageFolderDataModule(str(tmp_path)))
    assert torch.equal(data.load("train")[7][0], whole)


def test_a_folder_over_the_limit_is_decoded_on_the_fly(tmp_path):
    write_images(tmp_path / "train", 8)
    cached = ready(ImageFolderDataModule(str(tmp_path)))
    uncached = ready(
        ImageFolderDataModule(str(tmp_path), cache_limit_gb=1e-6, num_workers=1, batch_size=4)
    )
    assert not cached.images["train"].on_the_fly
    assert uncached.images["train"].on_the_fly
    cached_images, cached_labels = cached.load("train").__getitems__([0, 9])
    images, labels = uncached.load("train").__getitems__([0, 9])
    assert torch.equal(images, cached_images)
    assert torch.equal(labels, cached_labels)
    loaded = sum(len(labels) for _, labels in uncached.train_dataloader())
    assert loaded == len(uncached.images["train"])


def test_images_of_several_sizes_become_squares(tmp_path):
    write_images(tmp_path / "train", 4, size=(40, 30), classes=["a"])
    write_images(tmp_path / "train", 4, size=(20, 30), classes=["b"])
    assert ready(ImageFolderDataModule(str(tmp_path), val_fraction=0.5)).image_size == (30, 30)
    assert ready(
        ImageFolderDataModule(str(tmp_path), val_fraction=0.5, decode_size=16)
    ).image_size == (16, 16)


def test_folders_for_validation_and_test_are_used(tmp_path):
    for seed, (split, count) in enumerate({"train": 6, "val": 4, "test": 5}.items()):
        write_images(tmp_path / split, count, seed=seed)
    data = ready(ImageFolderDataModule(str(tmp_path)))
    assert {split: len(images) for split, images in data.images.items()} == {
        "train": 12,
        "val": 8,
        "test": 10,
    }


def test_newer_endings_are_read(tmp_path):
    write_images(tmp_path / "train", 3)
    for level, ending in enumerate(("jfif", "gif", "avif")):
        Image.new("L", (32, 32), 90 * level).save(tmp_path / "train" / "cat" / f"new.{ending}")
    data = ready(ImageFolderDataModule(str(tmp_path), val_fraction=0.5))
    assert (
        sum(name.startswith("train/cat/") for names in data.names.values() for name in names) == 6
    )


def test_an_image_that_is_left_out_is_no_duplicate(tmp_path):
    for split, seed in (("train", 0), ("test", 1)):
        write_images(tmp_path / split, 4, seed=seed)
    shutil.copy(tmp_path / "train" / "cat" / "000.png", tmp_path / "test" / "cat" / "copy.png")
    with pytest.warns(
        UserWarning,
        match=r"1 of 9 test images are also among those of training .* list those of training for",
    ):
        ImageFolderDataModule(str(tmp_path)).prepare_data()
    (tmp_path / "list.csv").write_text("image\ntrain/cat/000.png\n")
    with warnings.catch_warnings(action="error"):
        ImageFolderDataModule(str(tmp_path), leave_out=str(tmp_path / "list.csv")).prepare_data()


def test_a_duplicate_is_left_out_of_the_splits_that_are_asked_for(tmp_path):
    for split, seed in (("train", 0), ("test", 1)):
        write_images(tmp_path / split, 4, seed=seed)
    shutil.copy(tmp_path / "train" / "cat" / "000.png", tmp_path / "test" / "cat" / "copy.png")
    (tmp_path / "list.csv").write_text("image\ntest/cat/copy.png\n")
    options = {"root": str(tmp_path), "leave_out": str(tmp_path / "list.csv")}
    with pytest.raises(UserError, match="lists 1 images, but none of the train images"):
        ImageFolderDataModule(**options).prepare_data()
    with warnings.catch_warnings(action="error"):
        data = ImageFolderDataModule(**options, leave_out_splits=["val", "test"])
        data.prepare_data()
    data.setup()
    assert len(data.images["test"]) == 8
    assert "test/cat/copy.png" not in data.names_of_images("test")


def test_a_list_leaves_test_and_validation_images_alone_unless_asked(tmp_path):
    write_images(tmp_path / "train", 10)
    write_images(tmp_path / "test", 4)
    whole = ImageFolderDataModule(str(tmp_path), val_fraction=0.3)
    whole.setup()
    listed = [whole.names[split][0] for split in ("train", "val", "test")]
    (tmp_path / "list.csv").write_text("\n".join(["image", *listed]))
    options = {"root": str(tmp_path), "val_fraction": 0.3, "leave_out": str(tmp_path / "list.csv")}
    for splits_asked, gone in (("train", 1), (["train", "val"], 2), (["train", "val", "test"], 3)):
        data = ImageFolderDataModule(**options, leave_out_splits=splits_asked)
        data.setup()
        for number, split in enumerate(("train", "val", "test")):
            expected = whole.names[split][1:] if number < gone else whole.names[split]
            assert data.names_of_images(split) == expected
            assert len(data.images[split]) == len(expected)


def test_a_list_of_test_images_alone_is_refused_unless_they_are_meant(tmp_path):
    write_images(tmp_path / "train", 10)
    write_images(tmp_path / "test", 4)
    (tmp_path / "list.csv").write_text("image\ntest/cat/000.png\n")
    data = ImageFolderDataModule(str(tmp_path), leave_out=str(tmp_path / "list.csv"))
    with pytest.raises(
        UserError,
        match=r"lists 1 images, but none of the train images: name their splits too, "
        r"leave_out_splits=\[train,val,test\]",
    ):
        data.setup()
    with pytest.raises(UserError, match=r"leave_out_splits .*train, val, test, or a list of them"):
        ImageFolderDataModule(str(tmp_path), leave_out_splits=["training"])


def test_a_list_names_images_of_cifar10_by_number_or_by_file(tmp_path):
    """The audit names them as all layouts do; a folder shows files."""
    names = {"train": ["train/cat/7", "train/cat/8", "train/dog/7"]}
    for listed in ("train/cat/7", "train/cat/00007.png", "train/cat/7.jpg"):
        (tmp_path / "list.csv").write_text(f"image\n{listed}\n")
        left = splits.rows_left(names, str(tmp_path / "list.csv"))
        assert left["train"].tolist() == [1, 2]
    names = {"train": ["train/cat/00007.png", "train/cat/7.jpg", "train/cat/8.png"]}
    for listed, rows in (("train/cat/7.jpg", [0, 2]), ("train/cat/7", [2])):
        (tmp_path / "list.csv").write_text(f"image\n{listed}\n")
        left = splits.rows_left(names, str(tmp_path / "list.csv"))
        assert left["train"].tolist() == rows


def test_pixels_that_are_floats_are_refused(tmp_path):
    Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)).save(
        tmp_path / "floats.tif"
    )
    with pytest.raises(
        UserError,
        match=r"floats\.tif cannot be decoded .* pixels are floats, whose range is not known",
    ):
        read_image(tmp_path / "floats.tif")


def test_every_mode_of_image_becomes_rgb(tmp_path):
    ramp = np.linspace(0, 65535, 64).reshape(8, 8)
    grey8 = (ramp // 257).astype(np.uint8)
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "16.png")
    Image.fromarray(grey8).save(tmp_path / "8.png")
    colours = Image.merge("RGB", [Image.fromarray(grey8)] * 3)
    colours.convert("RGBA").save(tmp_path / "rgba.png")
    colours.convert("P").save(tmp_path / "palette.png")
    colours.convert("CMYK").save(tmp_path / "cmyk.tif")
    for path in sorted(tmp_path.iterdir()):
        image = read_image(path)
        assert (image.dtype, image.shape) == (np.uint8, (3, 8, 8)), path.name
        assert np.abs(image.astype(int) - grey8).max() <= (
            51 if path.name == "palette.png" else 1
        ), path.name


GREY = np.linspace(0, 255, 64).astype(np.uint8).reshape(8, 8)


@pytest.mark.parametrize(
    ("values", "ending"),
    [
        (GREY.astype(np.uint16), "png"),
        (GREY.astype(np.int32), "tif"),
        (GREY.astype(np.uint16) * 257, "png"),
        (GREY.astype(np.uint16) * 257, "tif"),
    ],
    ids=["8 bits in 16", "8 bits in 32", "16 bits", "16 bits in TIFF"],
)
def test_grey_values_are_read_by_the_bits_that_they_use(tmp_path, values, ending):
    Image.fromarray(values).save(tmp_path / f"x.{ending}")
    assert np.array_equal(read_image(tmp_path / f"x.{ending}"), np.stack([GREY] * 3))


def test_sixteen_bits_that_would_be_nearly_black_are_warned_of(tmp_path):
    Image.fromarray(GREY.astype(np.uint16) * 16).save(tmp_path / "x.png")
    with pytest.warns(UserWarning, match="use 12 of them or fewer, .* nearly black: scale them"):
        assert read_image(tmp_path / "x.png").max() == 15
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png").max() == 0


@pytest.mark.parametrize(("ink", "paper"), [(0, 255), (200, 0)])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_a_drawing_in_the_transparency_alone_is_seen(tmp_path, mode, ink, paper):
    alpha = np.where(GREY > 128, 255, 0).astype(np.uint8)
    drawing = Image.fromarray(np.full_like(GREY, ink))
    drawing.putalpha(Image.fromarray(alpha))
    if mode == "P":
        drawing = Image.fromarray((GREY > 128).astype(np.uint8), "P")
        drawing.putpalette([ink] * 6)
        drawing.info["transparency"] = bytes([0, 255])
    else:
        drawing = drawing.convert(mode)
    drawing.save(tmp_path / "x.png")
    expected = np.where(alpha == 255, ink, paper)
    assert np.array_equal(read_image(tmp_path / "x.png")[0], expected)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "a transparent colour"])
def test_what_is_transparent_in_a_picture_is_white(tmp_path, mode):
    picture = Image.fromarray(GREY)
    expected = np.where(GREY[3, 3] == GREY, 255, GREY)
    if mode == "a transparent colour":
        picture.save(tmp_path / "x.png", transparency=int(GREY[3, 3]))
    else:
        alpha = np.where(GREY[3, 3] == GREY, 0, 255).astype(np.uint8)
        picture.putalpha(Image.fromarray(alpha))
        picture.convert(mode).save(tmp_path / "x.png")
    assert np.array_equal(read_image(tmp_path / "x.png")[1], expected)


def test_half_transparent_is_half_white_and_one_transparency_for_all_is_none(tmp_path):
    picture = Image.fromarray(GREY)
    picture.putalpha(Image.fromarray(np.where(GREY > 99, 128, 255).astype(np.uint8)))
    picture.save(tmp_path / "x.png")
    share = np.where(GREY > 99, 128 / 255, 1)
    expected = share * GREY + (1 - share) * 255
    assert np.abs(read_image(tmp_path / "x.png")[0] - expected).max() <= 1
    picture.putalpha(0)
    picture.save(tmp_path / "x.png")
    assert np.array_equal(read_image(tmp_path / "x.png")[0], GREY)


@pytest.mark.parametrize("workers", ["cache", "on the fly"])
def test_a_broken_image_is_named(tmp_path, workers):
    write_images(tmp_path / "train", 20)
    broken = tmp_path / "train" / "dog" / "007.png"
    broken.write_bytes(broken.read_bytes()[:60])
    data = ImageFolderDataModule(
        str(tmp_path), cache_limit_gb=8.0 if workers == "cache" else 1e-9, num_workers=1
    )
    with pytest.raises(UserError, match=f"^{re.escape(str(broken))} cannot be decoded") as error:
        for _ in ready(data).train_dataloader():
            pass
    assert "\n" not in str(error.value)
    assert not list((tmp_path / CACHE_FOLDER).glob("*.npy")) or workers == "on the fly"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, "train is missing"),
        (lambda root: (root / "train").mkdir(), "no folders"),
        (lambda root: write_images(root / "train", 2, classes=["only"]), "one class only"),
        (
            lambda root: [(root / "train" / name).mkdir(parents=True) for name in "ab"],
            "no images of a, b",
        ),
        (
            lambda root: (
                write_images(root / "train", 3),
                write_images(root / "test", 2, classes=["cow"]),
            ),
            "cow",
        ),
    ],
)
def test_a_folder_of_another_layout_is_explained(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(UserError, match=f"(?i){message}"):
        ready(ImageFolderDataModule(str(tmp_path)))


def test_batches_are_shuffled_by_seed_and_epoch_and_kept_in_order_for_evaluation():
    data = ready(ShapesDataModule(train_images=100, test_images=40, batch_size=32))

    def labels(loader):
        return torch.cat([labels for _, labels in loader]).tolist()

    loader = data.train_dataloader()
    first = labels(loader)
    assert first == labels(loader), "the epoch decides, not how often it is read"
    loader.sampler.set_epoch(1)
    assert first != labels(loader)
    assert sorted(first) == sorted(labels(loader)) == sorted(data.images["train"].labels.tolist())
    assert labels(data.test_dataloader()) == data.images["test"].labels.tolist()


@pytest.mark.slow
def test_chance_follows_from_seed_epoch_step_and_rank():
    numbers = list(product(range(3), repeat=4))
    assert len({step_seed(*four) for four in numbers}) == len(numbers)

    class Witness(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            states.append(torch.get_rng_state().numpy().tobytes())

    runs = []
    for seed in (0, 0, 1):
        states: list[bytes] = []
        data = ShapesDataModule(train_images=60, test_images=10, batch_size=18, seed=seed)
        trainer = quiet_trainer(
            max_epochs=2,
            limit_val_batches=0,
            callbacks=[Witness()],
        )
        trainer.fit(TransferClassifier("shufflenet_v2_x0_5", "none"), data)
        torch.rand(7)  # other random numbers make no difference
        runs.append(states)
    assert len(set(runs[0])) == len(runs[0]) == 6
    assert runs[0] == runs[1]
    assert not set(runs[0]) & set(runs[2])


def test_a_last_batch_of_one_image_is_left_out():
    data = ready(ShapesDataModule(train_images=100, test_images=10, batch_size=32))
    data.images["train"] = data.images["train"].subset(np.arange(65))
    assert [len(labels) for _, labels in data.train_dataloader()] == [32, 32]


@pytest.mark.parametrize(
    "bad", [{"batch_size": 1}, {"val_fraction": 1.0}, {"num_workers": -1}, {"task": "sideways"}]
)
def test_options_out_of_range_are_refused(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        ShapesDataModule(**bad)


class WithOwnOption(ShapesDataModule):
    """A data module of a user's own, with an option of its own."""

    def __init__(self, flavour):
        super().__init__()
        self.store_options(flavour=flavour)


def reloaded_options(data):
    """Return the options of a data module as a checkpoint gives them back."""
    file = io.BytesIO()
    torch.save(dict(data.hparams), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(
    ("name", "value", "stored"),
    [
        ("batch_size", np.int64(4), 4),
        ("eval_batch_size", torch.tensor(8), 8),
        ("val_fraction", np.float64(0.25), 0.25),
        ("class_weights", np.array([1.0, 2.0]), [1.0, 2.0]),
        ("class_weights", np.str_("balanced"), "balanced"),
        ("sampler", np.str_("balanced"), "balanced"),
        ("num_workers", np.int32(0), 0),
        ("seed", np.uint8(3), 3),
        ("leave_out", Path("list.csv"), "list.csv"),
        ("task", np.str_("upstream"), "upstream"),
        ("train_images", np.int64(50), 50),
        ("test_images", torch.tensor([20]), 20),
    ],
)
def test_options_of_drawn_shapes_are_stored_as_primitives(
    tmp_path, monkeypatch, name, value, stored
):
    monkeypatch.chdir(tmp_path)
    Path("list.csv").write_text("image\n")
    data = ShapesDataModule(**{name: value})
    option = reloaded_options(data)[name]
    assert (option, type(option)) == (stored, type(stored))
    assert (getattr(data, name), type(getattr(data, name))) == (stored, type(stored))


@pytest.mark.parametrize(
    ("name", "value", "stored"),
    [
        ("root", Path("photos"), "photos"),
        ("root", np.str_("photos"), "photos"),
        ("decode_size", np.int64(16), 16),
        ("cache_limit_gb", np.float64(0.5), 0.5),
        ("max_megapixels", torch.tensor(2.0), 2.0),
    ],
)
def test_options_of_an_image_folder_are_stored_as_primitives(
    tmp_path, monkeypatch, name, value, stored
):
    monkeypatch.chdir(tmp_path)
    write_images(Path("photos/train"), 4)
    data = ready(ImageFolderDataModule(**{"root": "photos", name: value}))
    option = reloaded_options(data)[name]
    assert (option, type(option)) == (stored, type(stored))
    assert all(type(side) is int for side in data.size), "which a checkpoint stores too"


@pytest.mark.parametrize(
    ("name", "value", "stored"),
    [
        ("root", Path("images"), "images"),
        ("url", np.str_("http://host/archive"), "http://host/archive"),
        ("url", "http://user:password@host/archive", "http://host/archive"),
    ],
)
def test_options_of_cifar10_are_stored_as_primitives(name, value, stored):
    option = reloaded_options(CIFAR10DataModule(**{name: value}))[name]
    assert (option, type(option)) == (stored, str)


GIVEN = {
    "padding": (np.array(3), 3),
    "preset": (np.str_("photos"), "photos"),
    "padding_mode": (np.str_("reflect"), "reflect"),
    "interpolation": (np.str_("bilinear"), "bilinear"),
    "crop_scale": (np.array([0.5, 1.0]), [0.5, 1.0]),
    "crop_ratio": ((np.float32(0.5), 2), [0.5, 2]),
}


@pytest.mark.parametrize("field", fields(Augment), ids=lambda field: field.name)
def test_options_of_the_augmentation_are_stored_as_primitives(field):
    given, expected = GIVEN.get(field.name, (np.array(0.25), 0.25))
    augment = Augment(**{field.name: given})
    option = reloaded_options(ShapesDataModule(augment=augment))["augment"][field.name]
    assert (option, type(option)) == (expected, type(expected))
    assert type(getattr(augment, field.name)) is type(expected)


@pytest.mark.parametrize(
    ("make", "option", "value"),
    [
        (ShapesDataModule, "seed", object()),
        (ShapesDataModule, "class_weights", {1.0, 2.0}),
        (ShapesDataModule, "leave_out", open),
        (ShapesDataModule, "task", max),
        (CIFAR10DataModule, "url", object()),
        (ImageFolderDataModule, "root", open),
        (Augment, "flip", object()),
        (WithOwnOption, "flavour", object()),
    ],
)
def test_an_option_that_cannot_be_stored_is_refused(make, option, value):
    with pytest.raises(UserError, match=f"{option} is .*, which a checkpoint cannot store"):
        make(**{option: value})


def test_options_of_a_users_own_data_module_are_stored_as_primitives():
    options = reloaded_options(WithOwnOption({"sour": Path("lemon"), "sweet": np.arange(3)}))
    assert options["flavour"] == {"sour": "lemon", "sweet": [0, 1, 2]}


@pytest.mark.slow
def test_real_images_are_read_exactly(shared, tmp_path):
    import subprocess
    import sys

    script = shared / "real_data.py"
    subprocess.run([sys.executable, script, "folder", tmp_path, "--per-class", "30"], check=True)
    data = ready(CIFAR10DataModule(str(tmp_path)))
    assert len(data.images["train"]) + len(data.images["val"]) == 300
    mean = data.load("train").__getitems__(list(range(300)))[0].float().mean((0, 2, 3)) / 255
    torch.testing.assert_close(mean, torch.tensor([0.4914, 0.4822, 0.4465]), atol=0.03, rtol=0)
    subprocess.run(
        [sys.executable, script, "batches", tmp_path / "b", "--per-class", "3"], check=True
    )
    with pytest.raises(UserError, match="not the official file"):
        CIFAR10DataModule(str(tmp_path / "b")).prepare_data()


def test_files_are_looked_through_once(monkeypatch):
    loaded, load = [], ShapesDataModule.load
    monkeypatch.setattr(
        ShapesDataModule, "load", lambda data, split: loaded.append(split) or load(data, split)
    )
    data = ShapesDataModule(train_images=40, test_images=10)
    data.prepare_data()
    data.setup()
    assert sorted(loaded) == ["test", "train", "val"]


@pytest.mark.skipif(
    not Path("/proc/self/smaps").exists(), reason="only Linux says which memory is shared"
)
def test_processes_share_the_memory_of_the_images(tmp_path):
    write_images(tmp_path / "train", per_class=64)
    data = ImageFolderDataModule(str(tmp_path), batch_size=16)
    data.prepare_data()
    data.setup()
    assert (
        sum(len(labels) for _, labels in data.train_dataloader()) == len(data.images["train"]) > 96
    )
    kilobytes = dict.fromkeys(("Rss", "Private_Dirty", "Anonymous"), 0)
    ours = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in kilobytes and ours:
            kilobytes[name] += int(rest.split()[0])
        elif re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            ours = str(tmp_path) in line
    assert (
        kilobytes["Rss"] >= 128 * 3
    )  # of 3 KB an image, in the page cache, which there is once a machine
    assert kilobytes["Private_Dirty"] == kilobytes["Anonymous"] == 0
