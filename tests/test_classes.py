"""A run is not continued or evaluated on other classes: the labels would be wrong."""

import shutil

import pytest
from conftest import quiet_trainer, untouched, write_images

from cifar_transfer import ImageFolderDataModule, TransferClassifier
from cifar_transfer.base.errors import UserError
from cifar_transfer.commands.evaluate import evaluate
from cifar_transfer.commands.fit import fit
from cifar_transfer.data.classes import check_classes

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
JOB += ["--trainer.max_epochs=1", "--model.image_size=32"]
RUN = "lightning_logs/version_1"
BEST = f"{RUN}/checkpoints/best.ckpt"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run on images of cats and dogs, the second in its folder."""
    folder = tmp_path_factory.mktemp("classes")
    for split, count in (("train", 9), ("test", 3)):
        write_images(folder / "photos" / split, count, size=(36, 33), seed=count)
    (folder / "lightning_logs/version_0").mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        fit(JOB)
    return folder


@pytest.fixture
def renamed(tmp_path, monkeypatch, trained):
    """A copy of it, whose cats are called pumas, so that the dogs come first."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    for split in ("train", "test"):
        (tmp_path / "photos" / split / "cat").rename(tmp_path / "photos" / split / "puma")
    return tmp_path


BOTH = "other classes than the network was trained for: the network cat, dog; the data dog, puma"


@pytest.mark.parametrize("how", [f"--resume={RUN}", f"--ckpt_path={BEST}"])
def test_a_run_does_not_continue_with_other_classes(renamed, how):
    with untouched(renamed / RUN / "checkpoints"), pytest.raises(UserError, match=BOTH):
        fit([*JOB, how, "--trainer.max_epochs=2"])


def test_a_checkpoint_is_not_evaluated_on_other_classes(renamed):
    with untouched(renamed / "lightning_logs"), pytest.raises(UserError, match=BOTH):
        evaluate(BEST, accelerator="cpu")


@pytest.mark.parametrize("named", [True, False])
def test_python_refuses_other_classes_too(renamed, named):
    data = ImageFolderDataModule("photos", val_fraction=0.4)
    model = TransferClassifier(
        "lenet5", "none", 2, data.class_names if named else None, image_size=32
    )
    with pytest.raises(UserError, match=BOTH):
        quiet_trainer(max_epochs=2).fit(model, data, ckpt_path=BEST)
    with pytest.raises(UserError, match=BOTH):
        quiet_trainer().test(model, data, ckpt_path=BEST)


def test_a_loaded_model_is_not_tested_on_other_classes(renamed):
    model = TransferClassifier.load_from_checkpoint(BEST)
    with pytest.raises(UserError, match=BOTH):
        quiet_trainer().test(model, ImageFolderDataModule("photos"))


def test_names_given_in_another_order_are_refused_before_training(trained):
    data = ImageFolderDataModule(str(trained / "photos"))
    model = TransferClassifier("lenet5", "none", class_names=["dog", "cat"], image_size=32)
    with pytest.raises(
        UserError,
        match=r"their classes in another order .*: the network dog, cat; the data cat, dog",
    ):
        quiet_trainer(max_epochs=1).fit(model, data)


def test_the_message_for_long_lists_has_what_differs():
    names = [f"class {i:03d}" for i in range(200)]
    check_classes(names, list(names))
    with pytest.raises(
        UserError, match="the network class 000, class 199; the data class 199, class 000"
    ):
        check_classes(names, [names[-1], *names[1:-1], names[0]])
    with pytest.raises(UserError, match="the network none besides; the data one more"):
        check_classes(names, ["one more", *names])
    with pytest.raises(UserError, match=r"class 009, \.\.\.; the data a, b"):
        check_classes(names, ["a", "b"])
