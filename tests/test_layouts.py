"""Folders of images as people have them, and what is said of those that do not fit."""

import unicodedata
import warnings
from pathlib import Path

import pytest
from conftest import run_fit, write_images

from cifar_transfer import CIFAR10DataModule, ImageFolderDataModule, ShapesDataModule
from cifar_transfer.base.errors import UserError
from cifar_transfer.commands.evaluate import evaluate
from cifar_transfer.data import cifar
from cifar_transfer.data.images import MAX_NAMED_IMAGES

NFC = unicodedata.normalize("NFC", "café")
NFD = unicodedata.normalize("NFD", "café")


def ready(data):
    data.prepare_data()
    data.setup()
    return data


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home with images, and a current folder without."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    write_images(tmp_path / "home" / "photos" / "train", 6)
    return tmp_path / "home"


def test_a_home_is_found_in_paths_of_data(home):
    (home / "list.csv").write_text("image\ntrain/cat/000.png\n")
    data = ImageFolderDataModule("~/photos", leave_out="~/list.csv", val_fraction=0.5)
    assert data.hparams["root"] == str(home / "photos")
    assert data.hparams["leave_out"] == str(home / "list.csv")
    ready(data)
    assert sum(map(len, data.images.values())) == 11
    assert CIFAR10DataModule("~/cifar").root == home / "cifar"
    assert not Path("~").exists()


def test_a_home_of_nobody_is_a_name_like_any_other(home):
    with pytest.raises(UserError, match=r"^~nobody-of-this-name/photos/train is missing"):
        ImageFolderDataModule("~nobody-of-this-name/photos")


def as_train_of(root):
    write_images(root / "train", 2)
    return root / "train"


def as_file(root):
    path = root / "photos.zip"
    path.write_bytes(b"PK")
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: root / "no", r"train is missing, because there is no folder .*no: name an"),
        (as_file, r"photos\.zip is a file: unpack it if it is an archive"),
        (as_train_of, r"train is missing: name the folder above, /.*, whose train/ has"),
        (lambda root: root, r"train is missing: put the images of each class into "),
    ],
    ids=["no folder", "a file", "one too deep", "empty"],
)
def test_a_root_without_train_is_explained(tmp_path, make, message):
    with pytest.raises(UserError, match=message):
        ImageFolderDataModule(str(make(tmp_path)))


def own_images(root, splits):
    for split in splits:
        write_images(root / split, 2)
    return root


@pytest.mark.parametrize("splits", [["train"], ["train", "test"], ["."]])
def test_cifar10_is_not_looked_for_among_images_of_ones_own(tmp_path, splits, monkeypatch):
    monkeypatch.setattr(cifar, "download", lambda *args: pytest.fail("it downloads"))
    write_images(tmp_path / splits[0], 2, classes=["dachshund"])
    own_images(tmp_path, splits)
    message = r"other classes than CIFAR-10's \(dachshund\): .* add --data=ImageFolderDataModule"
    with pytest.raises(UserError, match=message):
        CIFAR10DataModule(str(tmp_path))


def test_cifar10_may_lie_beside_other_files(tmp_path):
    write_images(tmp_path / "train", 2, classes=cifar.CLASSES)
    CIFAR10DataModule(str(tmp_path))
    write_images(tmp_path / "photos" / "train", 2, classes=["a", "b"])
    CIFAR10DataModule(str(tmp_path / "photos" / ".."))
    CIFAR10DataModule(str(tmp_path / "nowhere"))


def test_a_file_in_the_place_of_cifar10s_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"photos\.zip is a file: name the folder"):
        CIFAR10DataModule(str(as_file(tmp_path)))


@pytest.mark.parametrize("fraction", [0.1, 0.9])
def test_one_image_a_class_cannot_be_split(tmp_path, fraction):
    write_images(tmp_path / "train", 1)
    message = r"^There is nothing to validate on, because each class has one .*or a folder val/\.$"
    with pytest.raises(UserError, match=message):
        ready(ImageFolderDataModule(str(tmp_path), val_fraction=fraction))
    write_images(tmp_path / "val", 1, seed=1)
    data = ready(ImageFolderDataModule(str(tmp_path), val_fraction=fraction))
    assert [len(images) for images in data.images.values()] == [2, 2]


@pytest.mark.parametrize("split", ["val", "test"])
def test_images_without_classes_are_told_of_and_left_alone(tmp_path, caplog, split):
    caplog.set_level("INFO")
    write_images(tmp_path / "train", 6)
    write_images(tmp_path, 5, classes=[split])
    data = ready(ImageFolderDataModule(str(tmp_path), val_fraction=0.5))
    assert list(data.images) == ["train", "val"]
    assert sum(map(len, data.images.values())) == 12
    told = [line for line in caplog.messages if "have no labels and are left alone" in line]
    assert len(told) == 1
    assert f"predict {tmp_path / split}" in told[0]


def test_folders_that_are_no_classes_are_named(tmp_path):
    write_images(tmp_path / "train", 6)
    write_images(tmp_path / "test", 2, classes=["unknown"])
    message = r"test has folders that are no classes of training \(unknown\): rename them, or move"
    with pytest.raises(UserError, match=message):
        ready(ImageFolderDataModule(str(tmp_path)))


@pytest.mark.parametrize(("train", "test"), [(NFC, NFD), (NFD, NFC), (NFD, NFD)])
def test_a_class_is_one_in_whatever_way_unicode_writes_its_name(tmp_path, train, test):
    write_images(tmp_path / "train", 6, classes=[train, "tea"])
    write_images(tmp_path / "test", 2, classes=[test, "tea"], seed=1)
    data = ready(ImageFolderDataModule(str(tmp_path), val_fraction=0.5))
    assert data.class_names == [NFC, "tea"]
    assert len(data.images["test"]) == 4
    assert set(data.names["test"]) == {
        f"test/{name}/00{number}.png" for name in (NFC, "tea") for number in (0, 1)
    }
    assert {name for name in data.names["val"] if NFD in name} == set()


def test_a_list_names_an_image_in_either_way_of_unicode(tmp_path):
    write_images(tmp_path / "train", 6, classes=[NFD, "tea"])
    for number, name in enumerate((NFC, NFD)):
        (tmp_path / "list.csv").write_text(f"image\ntrain/{name}/00{number}.png\n")
        left_out = {"leave_out": str(tmp_path / "list.csv"), "leave_out_splits": ["train", "val"]}
        data = ready(ImageFolderDataModule(str(tmp_path), **left_out))
        assert sum(map(len, data.images.values())) == 11


def test_two_folders_of_one_class_are_refused(tmp_path):
    write_images(tmp_path / "train", 2, classes=[NFC, NFD, "tea"])
    if len(list((tmp_path / "train").iterdir())) == 2:
        pytest.skip("this file system keeps one of them")
    message = rf"train has two folders called {NFC}, .*put the images of both into one\.$"
    with pytest.raises(UserError, match=message):
        ImageFolderDataModule(str(tmp_path))


def cut(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path


def test_all_broken_images_are_named_at_once(tmp_path):
    write_images(tmp_path / "train", 70)
    write_images(tmp_path / "test", 3, seed=1)
    names = ["train/cat/000.png", "train/dog/069.png", "test/cat/001.png"]
    broken = [cut(tmp_path / name) for name in names]
    (tmp_path / "train/dog/001.png").write_bytes(b"")  # which has no size either
    with pytest.raises(UserError, match=r"^4 images cannot be read\. /") as raised:
        ready(ImageFolderDataModule(str(tmp_path)))
    for path in [*broken, tmp_path / "train/dog/001.png"]:
        assert str(raised.value).count(f"{path} cannot be decoded") == 1


def test_of_many_broken_images_the_first_are_named(tmp_path):
    write_images(tmp_path / "train", 20)
    for path in tmp_path.glob("train/*/*"):
        path.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"^40 images cannot be read\. .* And 20 more\.$") as raised:
        ready(ImageFolderDataModule(str(tmp_path)))
    assert str(raised.value).count("cannot be decoded") == MAX_NAMED_IMAGES


def test_images_decoded_on_the_fly_are_looked_at_before_training(tmp_path):
    write_images(tmp_path / "train", 6)
    names = ("cat/000.png", "dog/003.png")
    for name in names:
        (tmp_path / "train" / name).write_bytes(b"no image")
    with pytest.raises(UserError, match=r"^2 images cannot be read\. .*cat/000.*dog/003"):
        ready(ImageFolderDataModule(str(tmp_path), cache_limit_gb=0))


BEFORE_SETUP = {
    "train_dataloader": lambda data: data.train_dataloader(),
    "val_dataloader": lambda data: data.val_dataloader(),
    "test_dataloader": lambda data: data.test_dataloader(),
    "image_size": lambda data: data.image_size,
    "loss_weights": lambda data: data.loss_weights(),
    "record_splits": lambda data: data.record_splits(Path()),
}


@pytest.mark.parametrize("use", BEFORE_SETUP.values(), ids=BEFORE_SETUP)
@pytest.mark.parametrize("prepared", [False, True])
def test_a_data_module_that_is_not_set_up_says_so(use, prepared):
    data = ShapesDataModule(train_images=20, test_images=10)
    if prepared:
        data.prepare_data()
    with pytest.raises(UserError, match=r"not loaded yet: call prepare_data\(\) and setup\(\)"):
        use(data)


@pytest.mark.slow
def test_new_images_in_test_alone_are_evaluated(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "photos" / "train", 8, classes=["ape", "bee", "cow"])
    run_fit(
        tmp_path,
        "--data=ImageFolderDataModule",
        "--data.root=photos",
        "--data.batch_size=8",
        "--model.backbone=lenet5",
        "--model.weights=none",
        "--freeze.unfreeze_epoch=0",
        "--trainer.max_epochs=1",
        "--trainer.accelerator=cpu",
        "--report.figures=false",
    )
    write_images(tmp_path / "new" / "test", 4, classes=["bee", "cow"])
    ckpt = "lightning_logs/version_0/checkpoints/best.ckpt"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = evaluate(ckpt, root="new", accelerator="cpu", figures=False)
    assert 0 <= scores["test/acc"] <= 1
    with pytest.raises(UserError, match="None of the images that the run validated on is left"):
        evaluate(ckpt, "val", root="new", accelerator="cpu", figures=False)
    with pytest.raises(UserError, match=r"^new/train is missing: put the images"):
        ImageFolderDataModule("new").class_names  # noqa: B018
    monkeypatch.chdir(tmp_path / "new")
    message = r"data of the run are not in photos.*name their folder with --root=FOLDER"
    with pytest.raises(UserError, match=message):
        evaluate(f"../{ckpt}", accelerator="cpu", figures=False)
