"""Images that are held out: chosen one by one, recorded with the run, kept when it continues."""

import gzip
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
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
from cifar_transfer.data.module import EarlierRun

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
    """Return those of the names "class/name" that are held out."""
    class_names = [name.partition("/")[0] for name in names]
    _, labels = np.unique(class_names, return_inverse=True)
    is_held_out = splits.hold_out(names, labels, fraction, str(seed))
    return set(np.array(names)[is_held_out].tolist())


NAMES = [f"{name}/{number:03d}.png" for name in ("cat", "dog", "猫") for number in range(200)]


def test_about_a_fraction_of_each_class_is_held_out_and_the_same_images_for_a_seed():
    chosen = held_out(NAMES)
    assert chosen == held_out(NAMES)
    assert held_out(NAMES, seed=1) not in (chosen, set())
    for class_name in ("cat", "dog", "猫"):
        assert 20 <= sum(name.startswith(f"{class_name}/") for name in chosen) <= 60
    assert chosen < held_out(NAMES, 0.5), "part of what a larger fraction holds out"


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
        "named as in the batches: no zeros before the number, no ending"
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of one epoch, the second in its folder, and its images `photos`."""
    folder = tmp_path_factory.mktemp("splits")
    write_images(folder / "photos" / "train", 12, size=(36, 33))
    (folder / "lightning_logs/version_0").mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        fit([*JOB, "--trainer.max_epochs=1"])
    return folder


@pytest.fixture
def folder(tmp_path, monkeypatch, trained):
    """A copy of `trained`, which is the current folder."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_records_its_splits(folder):
    names = splits.read_record(Path(RUN))
    files = {f"train/{path.parent.name}/{path.name}" for path in folder.glob("photos/train/*/*")}
    assert {*names["train"]} | {*names["val"]} == files
    assert len(names["train"]) + len(names["val"]) == 24
    assert names == names_of(ImageFolderDataModule("photos", val_fraction=0.4)) | {"test": []}


def change_images(folder):
    """Rename an image of each split, and add a hundred; return the names as they were recorded.

    Going by the hash alone, some images would change sides.
    """
    names = splits.read_record(Path(RUN))
    for split in ("train", "val"):
        path = folder / "photos" / names[split][0]
        path.rename(path.with_name(f"renamed {split}.png"))
    write_images(folder / "photos" / "more", 50, size=(36, 33), seed=3)
    for path in folder.glob("photos/more/*/*"):
        path.rename(folder / "photos/train" / path.parent.name / f"more {path.name}")
    shutil.rmtree(folder / "photos/more")
    return names


def test_a_run_continues_on_changed_images_without_validating_on_any_that_it_trained_on(
    folder, caplog
):
    before = change_images(folder)
    with caplog.at_level("INFO"):
        fit([*JOB, f"--resume={RUN}", "--trainer.max_epochs=2"])
    assert "102 are new and 2 are gone" in caplog.text
    after = splits.read_record(Path(RUN))
    present = {f"train/{path.parent.name}/{path.name}" for path in folder.glob("photos/train/*/*")}
    assert {*after["val"]} == {*before["val"]}, "that which is gone is remembered"
    assert {*after["train"]} == {*before["train"]} | present - {*before["val"]}


def test_another_run_that_continues_a_checkpoint_keeps_its_splits(folder):
    before = change_images(folder)
    fit([*JOB, f"--ckpt_path={LAST}", "--trainer.max_epochs=2"])
    assert {*splits.read_record(Path("lightning_logs/version_2"))["val"]} == {*before["val"]}


def test_evaluate_takes_the_recorded_images(folder, caplog):
    evaluate(LAST, "val", accelerator="cpu", figures=False)
    before = change_images(folder)
    with caplog.at_level("INFO"):
        evaluate(LAST, "val", accelerator="cpu", figures=False)
    assert f", {len(before['val']) - 1} val" in caplog.text.splitlines()[-1]


def test_a_record_is_used_for_no_checkpoint_of_another_run(folder, caplog):
    """One that lies where records are looked for, of another seed and so of other images."""
    shutil.rmtree("lightning_logs/version_0")
    other = fit([*JOB, "--trainer.max_epochs=1", "--seed_everything=1"]).best.parents[1]
    names = splits.read_record(other)["val"]
    assert names != splits.read_record(Path(RUN))["val"]
    before = evaluate(f"{other}/checkpoints/best.ckpt", "val", accelerator="cpu", figures=False)
    copied = Path(RUN, "checkpoints", "copied.ckpt")
    shutil.copy(other / "checkpoints/best.ckpt", copied)
    for ckpt in (copied, Path(RUN, "beside.ckpt"), Path("elsewhere.ckpt")):
        if ckpt != copied:
            copied.rename(ckpt)
        copied = ckpt
        with pytest.warns(UserWarning, match=f"{ckpt} lies outside of its run and has no record"):
            after = evaluate(str(ckpt), "val", accelerator="cpu", figures=False)
        assert after == before
    options = [*JOB, "--seed_everything=1", f"--ckpt_path={copied}", "--trainer.max_epochs=2"]
    with pytest.warns(UserWarning, match="validation images are chosen anew by their names"):
        continued = fit(options).best.parents[1]
    assert splits.read_record(continued)["val"] == names
    assert splits.run_of(continued) != splits.run_of(other)


def test_a_checkpoint_that_is_moved_with_its_run_keeps_its_record(folder):
    names = splits.read_record(Path(RUN))
    checkpoint = torch.load(LAST, weights_only=True)
    run = Path("moved")
    Path(RUN).rename(run)
    assert splits.read(run / "checkpoints/last.ckpt", checkpoint["recorded_run"]) == names
    fit([f"--resume={run}", "--trainer.max_epochs=2"])
    assert splits.run_of(run) == checkpoint["recorded_run"]


def test_a_checkpoint_of_a_run_that_records_nothing_takes_no_record(folder):
    """As from Python, beside somebody's record."""
    data = ImageFolderDataModule("photos", val_fraction=0.4, seed=1)
    model = TransferClassifier("lenet5", "none", class_names=data.class_names, image_size=32)
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(model, data)
    names = data.names
    trainer.save_checkpoint(f"{RUN}/checkpoints/mine.ckpt")
    trainer.validate(model, data, ckpt_path=f"{RUN}/checkpoints/mine.ckpt")
    assert data.names == names


def test_a_test_needs_no_validation_images(folder):
    write_images(folder / "elsewhere" / "train", 3, size=(36, 33), seed=5)
    for path in folder.glob("elsewhere/train/*/*"):
        path.rename(path.with_name(f"other {path.name}"))
    write_images(folder / "elsewhere" / "test", 4, size=(36, 33), seed=6)
    assert "test/acc" in evaluate(LAST, "test", root="elsewhere", accelerator="cpu", figures=False)
    with pytest.raises(UserError, match="None of the images that the run validated on is left"):
        evaluate(LAST, "val", root="elsewhere", accelerator="cpu", figures=False)


def test_figures_go_into_the_run_from_wherever_it_is_evaluated(folder, monkeypatch, capsys):
    monkeypatch.chdir(Path(LAST).parent)
    evaluate("last.ckpt", "val", root=str(folder / "photos"), accelerator="cpu")
    assert "figures  ../figures/val-*.png" in capsys.readouterr().out
    assert (folder / RUN / "figures" / "val-confusion.png").is_file()
    assert not Path("figures").exists()


def test_images_moved_from_training_to_validation_are_not_validated_on(folder):
    """New images there are not either: they may be training images under another name."""
    names = splits.read_record(Path(RUN))
    for name in names["train"][:3] + names["train"][-3:]:
        path = folder / "photos" / name.replace("train/", "val/")
        path.parent.mkdir(parents=True, exist_ok=True)
        (folder / "photos" / name).rename(path)
    message = "None of the images that the run validated on is left"
    with untouched(RUN), pytest.raises(UserError, match=message):
        fit([*JOB, f"--resume={RUN}", "--trainer.max_epochs=2"])


def test_python_continues_with_the_recorded_images_too(folder):
    before = change_images(folder)
    data = ImageFolderDataModule("photos", val_fraction=0.4)
    model = TransferClassifier("lenet5", "none", class_names=data.class_names, image_size=32)
    quiet_trainer(max_epochs=2).fit(model, data, ckpt_path=LAST)
    assert data.names["val"] == before["val"][1:]


@pytest.mark.parametrize("is_set_up", [False, True])
def test_a_data_module_continues_from_an_earlier_run_before_and_after_its_setup(
    folder, caplog, is_set_up
):
    record = splits.read_record(Path(RUN))
    change_images(folder)
    data = ImageFolderDataModule("photos", val_fraction=0.4)
    if is_set_up:
        data.prepare_data()
        data.setup()
        assert data.names["val"] != record["val"][1:]
        assert data.image_size == (33, 36)
    caplog.clear()
    with caplog.at_level("INFO"):
        data.continue_from(EarlierRun(size=(20, 24), record=record))
        data.continue_from(EarlierRun(record=record))
        data.prepare_data()
        data.setup()
    assert data.names["val"] == record["val"][1:]
    assert data.image_size == (20, 24)
    assert caplog.text.count("102 are new and 2 are gone") == 1
    assert caplog.text.count("Images: ") == 1, "it is said once"


def test_a_data_module_skips_the_batches_of_an_earlier_run_once():
    data = ShapesDataModule(train_images=100, test_images=10, batch_size=16)
    data.setup()
    data.load_state_dict({"first_batch": 2})
    resumed = list(data.train_dataloader())
    whole = list(data.train_dataloader())
    assert len(resumed) == len(whole) - 2
    for (images, labels), (whole_images, whole_labels) in zip(resumed, whole[2:], strict=True):
        assert torch.equal(images, whole_images)
        assert torch.equal(labels, whole_labels)


DAMAGED = {
    "empty": b"",
    "no gzip": b"no",
    "no JSON": gzip.compress(b"{"),
    "no splits": gzip.compress(b"[1]"),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_record_is_refused(folder, content):
    (folder / RUN / splits.RECORD).write_bytes(content)
    with (
        untouched(RUN),
        pytest.raises(UserError, match=r"splits\.json\.gz.* is damaged: restore it"),
    ):
        fit([*JOB, f"--resume={RUN}", "--trainer.max_epochs=2"])
