"""Files that cannot be read: all are named before training, or left out where that is asked for."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import RUN, quiet_trainer, run_fit, untouched, write_images

from cifar_transfer import ImageFolderDataModule, TableDataModule, TransferClassifier
from cifar_transfer.base.errors import UserError
from cifar_transfer.commands.evaluate import evaluate
from cifar_transfer.commands.fit import fit
from cifar_transfer.data import broken_files, cache
from cifar_transfer.data.broken_files import LIST
from cifar_transfer.data.cache import CACHE_FOLDER
from cifar_transfer.data.images import MAX_NAMED_IMAGES
from cifar_transfer.data.module import EarlierRun

BROKEN = ["train/cat/001.png", "train/dog/007.png", "test/dog/002.png"]


def breaks(root, names=BROKEN):
    for name in names:
        content = (root / name).read_bytes()
        (root / name).write_bytes(content[: len(content) // 2])


@pytest.fixture
def photos(tmp_path):
    """A folder of images, some of which are cut short."""
    write_images(tmp_path / "photos" / "train", 10)
    write_images(tmp_path / "photos" / "test", 4, seed=1)
    breaks(tmp_path / "photos")
    return tmp_path / "photos"


def ready(root, **options):
    data = ImageFolderDataModule(str(root), val_fraction=0.3, **options)
    data.prepare_data()
    data.setup()
    return data


WAYS = {"cached": 8.0, "on the fly": 1e-9}


@pytest.mark.parametrize("way", WAYS)
def test_all_broken_files_of_all_splits_are_named_and_listed(photos, way):
    for _ in range(2):  # also once it is known
        with pytest.raises(UserError, match=r"^3 images cannot be read") as error:
            ready(photos, cache_limit_gb=WAYS[way])
        message = str(error.value)
        assert message.startswith("3 images cannot be read. ")
        assert message.count("cannot be decoded as an image (") == 3
        for name in BROKEN:
            assert str(photos / name) in message
        place = photos / CACHE_FOLDER / LIST
        assert message.endswith(f"All are listed in {place}; skip_broken=true leaves them out.")
        with place.open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["image"] for row in rows] == BROKEN
        assert all("cannot be decoded" in row["reason"] for row in rows)
    assert not list((photos / CACHE_FOLDER).glob("*.npy")) or way == "cached"


def test_of_many_broken_files_the_list_has_all(photos):
    names = [f"train/{label}/{row:03d}.png" for label in ("cat", "dog") for row in range(10)]
    write_images(photos / "train", 20)
    breaks(photos, [*names, "train/cat/010.png", "train/cat/011.png"])
    with pytest.raises(
        UserError, match=r"^23 images cannot be read\..* And 3 more\. All are listed"
    ):
        ready(photos)
    assert MAX_NAMED_IMAGES == 20
    lines = (photos / CACHE_FOLDER / LIST).read_text().splitlines()
    assert len(lines) == 1 + 23


@pytest.mark.parametrize("way", WAYS)
def test_broken_files_are_left_out_and_found_once(photos, way, monkeypatch):
    options = {"cache_limit_gb": WAYS[way], "skip_broken": True}
    expected = r"Left out: 2 train, 1 test images that cannot be read, listed in .*broken\.csv \("
    with pytest.warns(UserWarning, match=expected) as told:
        data = ready(photos, **options)
    assert sum("Left out" in str(warning.message) for warning in told) == 1
    counts = {split: len(images) for split, images in data.images.items()}
    assert counts["train"] + counts["val"] == 18
    assert counts["test"] == 7
    for split, images in data.images.items():
        assert not set(BROKEN) & set(data.names[split])
        assert images.pixels(np.arange(len(images))).shape == (counts[split], 3, 32, 32)
    assert sorted(data.broken.reasons["train"]) == BROKEN[:2]
    monkeypatch.setattr(cache, "decoded_batches", pytest.fail)
    monkeypatch.setattr(broken_files, "decoded_batches", pytest.fail)
    with pytest.warns(UserWarning, match=expected):
        again = ready(photos, **options)
    assert again.names == data.names
    monkeypatch.undo()
    again.continue_from(EarlierRun(size=(16, 16)))  # decoded anew, and told of no more
    assert {split: len(images) for split, images in again.images.items()} == counts


def test_what_is_left_out_is_held_out_by_the_same_hash(photos, tmp_path):
    """Nothing else moves: those that stay are trained on or validated on as they were."""
    write_images(tmp_path / "whole" / "train", 10)
    whole = ready(tmp_path / "whole")
    with pytest.warns(UserWarning, match="Left out"):
        data = ready(photos, skip_broken=True)
    for split in ("train", "val"):
        moved = set(data.names[split]) ^ set(whole.names[split])
        assert len(moved - set(BROKEN)) <= 1, "but for the last one of a class"


def test_a_mended_file_is_taken_again(photos, tmp_path):
    with pytest.warns(UserWarning, match="Left out"):
        ready(photos, skip_broken=True)
    shutil.rmtree(tmp_path / "photos" / "train")
    shutil.rmtree(tmp_path / "photos" / "test")
    write_images(photos / "train", 10)
    write_images(photos / "test", 4, seed=1)
    data = ready(photos, skip_broken=True)
    assert sum(map(len, data.images.values())) == 28
    assert not data.broken


def test_a_class_of_which_no_image_can_be_read_is_named(photos):
    breaks(photos, [f"train/dog/{row:03d}.png" for row in range(10) if row != 7])
    with pytest.raises(UserError, match=r"^None of the training images of dog can be read: mend"):
        ready(photos, skip_broken=True)


@pytest.mark.filterwarnings("ignore:Images are not cached but decoded anew")
def test_where_nothing_can_be_written_broken_files_are_left_out_too(photos, monkeypatch):
    for module in (cache, broken_files):
        monkeypatch.setattr(module, "writable_folder", lambda folder: None)
    left_out = r"Left out: .* images that cannot be read \(train/cat/001\.png, "
    with pytest.warns(UserWarning, match=left_out):
        data = ready(photos, skip_broken=True)
    assert sum(map(len, data.images.values())) == 25
    with pytest.raises(UserError, match=r"skip_broken=true leaves them out\.$"):
        ready(photos)


def test_how_images_are_resized_is_told_once(photos, caplog):
    write_images(photos / "train", 1, size=(40, 20))
    with pytest.warns(UserWarning, match="Left out"):
        ready(photos, skip_broken=True)
    assert caplog.text.count("Images become ") == 1


def test_a_value_that_is_no_truth_is_refused(photos):
    with pytest.raises(UserError, match="skip_broken is 1: take true or false"):
        ImageFolderDataModule(str(photos), skip_broken=1)


def test_broken_files_of_tables_are_left_out(photos, monkeypatch):
    monkeypatch.chdir(photos)
    rows = [f"{path},{path.parent.name}" for path in sorted(Path("train").glob("*/*"))]
    Path("train.csv").write_text("\n".join(["image,label", *rows]))
    data = TableDataModule("train.csv", skip_broken=True)
    with pytest.warns(UserWarning, match=r"Left out: 2 train images .* \(train/train/cat/001\.png"):
        data.setup()
    assert sum(map(len, data.images.values())) == 18


@pytest.mark.slow
def test_a_run_says_at_its_end_what_it_left_out_and_is_resumed_and_evaluated(photos, monkeypatch):
    folder = photos.parent
    monkeypatch.chdir(folder)
    data = ["--data=ImageFolderDataModule", "--data.root=photos", "--data.batch_size=4"]
    job = ["--model.backbone=lenet5", "--model.weights=none", "--freeze.unfreeze_epoch=0"]
    end = ["--trainer.accelerator=cpu", "--report.figures=false", "--trainer.max_epochs=1"]
    monkeypatch.setattr("sys.argv", ["fit"])
    message = r"^3 images cannot be read\..*; --data\.skip_broken=true leaves them out\.$"
    with untouched(photos / "train"), pytest.raises(UserError, match=message):
        fit([*data, *job, *end])
    assert not (folder / RUN).exists()
    done = run_fit(folder, *data, *job, *end, "--data.skip_broken=true")
    last_lines = done.stdout[done.stdout.index("val accuracy") :]
    assert "left out" in last_lines
    assert "2 train, 1 test images that cannot be read, listed in photos/" in last_lines
    done = run_fit(folder, f"--resume={RUN}", "--trainer.max_epochs=2")
    assert "2 train, 1 test images that cannot be read" in done.stdout
    assert "The images have changed" not in done.stderr
    with pytest.warns(UserWarning, match="Left out: 2 train, 1 test images"):
        scores = evaluate(f"{RUN}/checkpoints/best.ckpt", accelerator="cpu", figures=False)
    assert 7 * scores["test/acc"] == pytest.approx(round(7 * scores["test/acc"]), abs=1e-5)


def test_a_fit_from_python_leaves_broken_files_out(photos):
    data = ImageFolderDataModule(str(photos), batch_size=4, skip_broken=True)
    model = TransferClassifier("lenet5", "none", num_classes=2)
    with pytest.warns(UserWarning, match="Left out"):
        quiet_trainer(max_epochs=1).fit(model, data)
    assert len(data.broken) == 3
