"""Data modules and arrays of a user's own: what does not fit is refused before training."""

import shutil

import numpy as np
import pytest
import torch
from conftest import RUN, TINY, quiet_trainer, run_fit, untouched, write_images
from lightning import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger

from cifar_transfer import ArrayImages, ImageDataModule, TransferClassifier
from cifar_transfer.base.errors import UserError
from cifar_transfer.data.images import Images


def noise(count, side=32):
    return np.random.default_rng(0).integers(0, 256, (count, 3, side, side), dtype=np.uint8)


class Fruit(ImageDataModule):
    """The data module of the README, which has no options of its own."""

    class_names = ("apple", "pear", "plum")
    test_side = 32

    def load(self, split):
        if split == "val":
            return None
        side = self.test_side if split == "test" else 32
        return ArrayImages(noise(60, side), np.arange(60) % 3)


def fitted(data, epochs, ckpt_path=None, folder=None):
    best = ModelCheckpoint(folder, save_last=True)
    model = TransferClassifier("lenet5", "none", num_classes=3)
    trainer = quiet_trainer(max_epochs=epochs, callbacks=[best], limit_train_batches=2)
    trainer.fit(model, data, ckpt_path=ckpt_path)
    return best.last_model_path


def test_a_resumed_run_of_a_users_own_data_keeps_its_validation_images(tmp_path):
    last = fitted(Fruit(batch_size=8), 1, folder=tmp_path)
    assert torch.load(last, weights_only=True)["datamodule_hyper_parameters"]["val_fraction"] == 0.1
    fitted(Fruit(batch_size=8), 2, last, tmp_path / "same")
    for other in ({"val_fraction": 0.4}, {"seed": 3}):
        with pytest.raises(UserError, match=r"differs from .*, with which the run began"):
            fitted(Fruit(batch_size=8, **other), 2, last, tmp_path / "other")


@pytest.mark.filterwarnings(
    "ignore:You passed in a `val_dataloader`"
)  # the module has no such step
def test_a_users_own_module_may_have_options_of_the_same_names(tmp_path):
    class Mine(LightningModule):
        def __init__(self, batch_size=1, seed="mine"):
            super().__init__()
            self.save_hyperparameters()
            self.layer = torch.nn.Linear(3, 3)

        def training_step(self, batch, batch_idx):
            return torch.nn.functional.cross_entropy(self.layer(batch[0].mean((2, 3))), batch[1])

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters())

    trainer = quiet_trainer(max_epochs=1, logger=TensorBoardLogger(tmp_path), log_every_n_steps=1)
    trainer.fit(Mine(), Fruit(batch_size=8))
    (options,) = tmp_path.rglob("hparams.yaml")
    assert "seed: mine" in options.read_text()


@pytest.mark.parametrize(
    ("array", "labels", "match"),
    [
        (
            noise(6) / np.float32(255),
            [0, 1] * 3,
            r"Images are uint8 \[N, 3, H, W\], RGB, .*, not float32 \[1, 3, 32, 32\]",
        ),
        (noise(6).astype(np.uint16) * 257, [0, 1] * 3, "not uint16"),
        (noise(6).transpose(0, 2, 3, 1), [0, 1] * 3, r"not uint8 \[1, 32, 32, 3\]"),
        (noise(6)[:, :1], [0, 1] * 3, r"not uint8 \[1, 1, 32, 32\]"),
        (noise(6), np.array([0, 1] * 3) * 0.99, r"Labels are whole numbers, .* not float64 \[6\]"),
        (noise(6), np.eye(6, dtype=int), r"Labels are .* not int64 \[6, 6\]"),
        (noise(6), [0, 1, 0], "There are 6 images and 3 labels: give one for each"),
        (noise(6), [0, 1] * 4, "There are 6 images and 8 labels"),
    ],
    ids=[
        "floats",
        "16 bits",
        "channels last",
        "grey",
        "float labels",
        "one-hot",
        "few labels",
        "many labels",
    ],
)
def test_arrays_of_another_form_are_refused_before_training(array, labels, match):
    class Other(Fruit):
        def load(self, split):
            return None if split == "val" else ArrayImages(array, labels)

    with pytest.raises(UserError, match=match):
        quiet_trainer(max_epochs=1).fit(
            TransferClassifier("lenet5", "none", num_classes=3), Other(batch_size=2)
        )


def test_tensors_may_take_the_place_of_arrays():
    images = ArrayImages(torch.from_numpy(noise(4)), torch.tensor([0, 1, 1, 0]))
    batch, labels = images.__getitems__([2, 0])
    assert torch.equal(batch, torch.from_numpy(noise(4))[[2, 0]])
    assert labels.tolist() == [1, 0]
    assert len(Images(np.array([]))) == 0


def test_splits_of_several_sizes_are_refused():
    class Other(Fruit):
        test_side = 64

    data = Other()
    data.setup()
    with pytest.raises(
        UserError, match=r"need one size, and have train 32 x 32, val 32 x 32, test 64 x 64: resize"
    ):
        assert data.image_size


@pytest.mark.slow
def test_images_that_come_or_go_within_an_epoch_are_refused_and_later_taken(tmp_path):
    write_images(tmp_path / "photos" / "train", 30)
    data = [
        "--data=ImageFolderDataModule",
        f"--data.root={tmp_path / 'photos'}",
        "--data.batch_size=4",
    ]
    job = [
        "--model.backbone=lenet5",
        "--model.weights=none",
        "--freeze.unfreeze_epoch=0",
        *TINY[-1:],
    ]
    run_fit(tmp_path, *data, *job, "--trainer.max_epochs=2", "--trainer.max_steps=5")
    shutil.copy(
        tmp_path / "photos" / "train" / "cat" / "000.png",
        tmp_path / "photos" / "train" / "cat" / "new.png",
    )
    resume = [f"--resume={tmp_path / RUN}", "--trainer.max_steps=-1"]
    with untouched(tmp_path / RUN):
        done = run_fit(tmp_path, *resume, expect=2)
    assert "which would skip or repeat some: have the images as they were" in done.stderr
    (tmp_path / "photos" / "train" / "cat" / "new.png").unlink()
    run_fit(tmp_path, *resume)
    (tmp_path / "photos" / "train" / "cat" / "001.png").unlink()
    done = run_fit(tmp_path, *resume, "--trainer.max_epochs=3")
    assert "0 are new and 1 are gone" in done.stderr
