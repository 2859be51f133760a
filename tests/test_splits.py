"""Which image is held out: the same whatever else is there, recorded with the run, and kept when it continues."""

import gzip
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import quiet_trainer, untouched, write_images

from cifar_transfer import (
    CIFAR10DataModule,
    ImageFolderDataModule,
    ShapesDataModule,
    TransferClassifier,
)
from cifar_transfer.base.errors import UserError
from cifar_transfer.commands.evaluate import evaluate
from cifar_transfer.commands.fit import fit
from cifar_transfer.data import splits
from cifar_transfer.data.cifar import CLASSES

JOB = [
    "--model.backbone=lenet5",
    "--model.weights=none",
    "--freeze.unfreeze_epoch=0",
    "--trainer.accelerator=cpu",
]
JOB += [
    "--report.figures=false",
    "--data=ImageFolderDataModule",
    "--data.root=photos",
    "--data.val_fraction=0.4",
]
JOB += ["--model.image_size=32"]
RUN = "lightning_logs/version_1"
LAST = f"{RUN}/checkpoints/last.ckpt"


def held_out(names, fraction=0.2, seed=0):
    """Of names "class/name" those that are held out."""
    labels = np.unique([name.partition("/")[0] for name in names], return_inverse=True)[1]
    return {
        name
        for name, held in zip(names, splits.hold_out(names, labels, fraction, seed), strict=True)
        if held
    }


NAMES = [f"{name}/{number:03d}.png" for name in ("cat", "dog", "猫") for number in range(200)]


def test_about_the_share_of_each_class_is_held_out_and_the_same_for_a_seed():
    chosen = held_out(NAMES)
    assert chosen == held_out(NAMES)
    assert held_out(NAMES, seed=1) not in (chosen, set())
    for name in ("cat", "dog", "猫"):
        assert 20 <= sum(one.startswith(f"{name}/") for one in chosen) <= 60
    assert chosen < held_out(NAMES, 0.5), "of a larger share it is a part"


def test_images_that_come_or_go_move_no_other():
    chosen = held_out(NAMES)
    assert held_out(NAMES[::-1]) == chosen
    for fewer in (NAMES[1:], NAMES[:150] + NAMES[200:]):
        assert held_out(fewer) == chosen & {*fewer}
    more = [*NAMES, *(f"cat/new {number}" for number in range(50)), "cow/1", "cow/2"]
    assert held_out(more) & {*NAMES} == chosen


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("fraction", "expected"), [(1e-9, {"b": 1, "c": 1}), (0.999999, {"b": 1, "c": 29})]
)
def test_a_class_of_two_or_more_has_images_on_both_sides_and_one_alone_is_trained_on(
    seed, fraction, expected
):
    names = ["a/1", "b/1", "b/2", *(f"c/{number}" for number in range(30))]
    chosen = [name[0] for name in held_out(names, fraction, seed)]
    assert {name: chosen.count(name) for name in chosen} == expected


def names_of(data):
    data.prepare_data()
    data.setup()
    return data.names


def test_images_without_names_go_by_class_and_number():
    names = names_of(ShapesDataModule(train_images=90, test_images=20))
    assert [len(names[split]) for split in splits.SPLITS] == [
        90 - len(names["val"]),
        len(names["val"]),
        20,
    ]
    assert {*names["train"]}.isdisjoint(names["val"])
    more = names_of(ShapesDataModule(train_images=90, test_images=70))
    assert more["val"] == names["val"]


def test_cifar10_is_split_alike_from_a_folder_and_from_arrays(tmp_path):
    for split in ("train", "test"):
        write_images(tmp_path / split, 6, classes=CLASSES)
    names = names_of(CIFAR10DataModule(str(tmp_path), val_fraction=0.3))
    assert "train/cat/0" in names["train"] + names["val"], (
        "as of the batches: no zeros before the number, no ending"
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of one epoch, the second in its folder, and its images."""
    folder = tmp_path_factory.mktemp("splits")
    write_images(folder / "photos" / "train", 12, size=(36, 33))
    (folder / "lightning_logs/version_0").mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        fit([*JOB, "--trainer.max_epochs=1"])
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch, trained):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_records_its_splits(here):
    names = splits.read(LAST)
    files = {f"train/{path.parent.name}/{path.name}" for path in here.glob("photos/train/*/*")}
    assert {*names["train"]} | {*names["val"]} == files
    assert len(names["train"]) + len(names["val"]) == 24
    assert names == names_of(ImageFolderDataModule("photos", val_fraction=0.4)) | {"test": []}


def change(here):
    """Of each split an image is renamed, so that by the hash alone some would change sides; a hundred come."""
    names = splits.read(LAST)
    for split in ("train", "val"):
        path = here / "photos" / names[split][0]
        path.rename(path.with_name(f"renamed {split}.png"))
    write_images(here / "photos" / "more", 50, size=(36, 33), seed=3)
    for path in here.glob("photos/more/*/*"):
        path.rename(here / "photos/train" / path.parent.name / f"more {path.name}")
    shutil.rmtree(here / "photos/more")
    return names


def test_a_run_continues_on_changed_images_without_validating_on_any_that_it_trained_on(
    here, caplog
):
    before = change(here)
    with caplog.at_level("INFO"):
        fit([*JOB, f"--resume={RUN}", "--trainer.max_epochs=2"])
    assert "102 are new and 2 are gone" in caplog.text
    after = splits.read(LAST)
    present = {f"train/{path.parent.name}/{path.name}" for path in here.glob("photos/train/*/*")}
    assert {*after["val"]} == {*before["val"]}, "that which is gone is remembered"
    assert {*after["train"]} == {*before["train"]} | present - {*before["val"]}


def test_another_run_that_continues_a_checkpoint_keeps_its_splits(here):
    before = change(here)
    fit([*JOB, f"--ckpt_path={LAST}", "--trainer.max_epochs=2"])
    assert {*splits.read("lightning_logs/version_2/checkpoints/last.ckpt")["val"]} == {
        *before["val"]
    }


def test_evaluate_takes_the_recorded_images(here, caplog):
    evaluate(LAST, "val", accelerator="cpu", figures=False)
    before = change(here)
    with caplog.at_level("INFO"):
        evaluate(LAST, "val", accelerator="cpu", figures=False)
    assert f", {len(before['val']) - 1} val" in caplog.text.splitlines()[-1]


def test_a_test_needs_no_validation_images(here):
    write_images(here / "elsewhere" / "train", 3, size=(36, 33), seed=5)
    for path in here.glob("elsewhere/train/*/*"):
        path.rename(path.with_name(f"other {path.name}"))
    write_images(here / "elsewhere" / "test", 4, size=(36, 33), seed=6)
    assert "test/acc" in evaluate(LAST, "test", root="elsewhere", accelerator="cpu", figures=False)
    with pytest.raises(UserError, match="None of the images that the run validated on is left"):
        evaluate(LAST, "val", root="elsewhere", accelerator="cpu", figures=False)


def test_figures_go_into_the_run_from_wherever_it_is_evaluated(here, monkeypatch, capsys):
    monkeypatch.chdir(Path(LAST).parent)
    evaluate("last.ckpt", "val", root=str(here / "photos"), accelerator="cpu")
    assert "figures  ../figures/val-*.png" in capsys.readouterr().out
    assert (here / RUN / "figures" / "val-confusion.png").is_file()
    assert not Path("figures").exists()
    with pytest.raises(
        UserError, match=r"projector=true comes with the figures: leave out figures=false"
    ):
        evaluate("last.ckpt", "val", figures=False, projector=True)


def test_images_moved_from_training_to_validation_are_not_validated_on(here):
    """Nor are new ones there, which may be any of them under another name."""
    names = splits.read(LAST)
    for name in names["train"][:3] + names["train"][-3:]:
        path = here / "photos" / name.replace("train/", "val/")
        path.parent.mkdir(parents=True, exist_ok=True)
        (here / "photos" / name).rename(path)
    said = "None of the images that the run validated on is left"
    with untouched(RUN), pytest.raises(UserError, match=said):
        fit([*JOB, f"--resume={RUN}", "--trainer.max_epochs=2"])


def test_python_continues_with_the_recorded_images_too(here):
    before = change(here)
    data = ImageFolderDataModule("photos", val_fraction=0.4)
    model = TransferClassifier("lenet5", "none", class_names=data.class_names, image_size=32)
    quiet_trainer(max_epochs=2).fit(model, data, ckpt_path=LAST)
    assert data.names["val"] == before["val"][1:]


DAMAGED = {
    "empty": b"",
    "no gzip": b"no",
    "no JSON": gzip.compress(b"{"),
    "no splits": gzip.compress(b"[1]"),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_record_is_refused(here, content):
    (here / RUN / splits.RECORD).write_bytes(content)
    with (
        untouched(RUN),
        pytest.raises(UserError, match=r"splits\.json\.gz.* is damaged: restore it"),
    ):
        fit([*JOB, f"--resume={RUN}", "--trainer.max_epochs=2"])
