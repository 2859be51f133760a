"""Batches of several processes and of resumed epochs: which process reads which image."""

from itertools import chain

import numpy as np
import pytest
import torch
from conftest import TINY, quiet_trainer, run_fit
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from cifar_transfer import Augment, ShapesDataModule, TransferClassifier
from cifar_transfer.base.errors import UserError
from cifar_transfer.data.images import ArrayImages
from cifar_transfer.data.loading import (
    InOrder,
    Shard,
    check_processes,
    evaluation_loader,
    training_loader,
)

STILL = Augment(
    padding=0, flip=0.0, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0, degrees=0.0
)
DDP = [
    *TINY,
    "--trainer.devices=2",
    "--trainer.strategy=ddp",
    "--trainer.max_epochs=1",
    "--freeze.unfreeze_epoch=0",
]


def numbered(count):
    """Return images of 2 x 3 pixels whose labels are their numbers."""
    return ArrayImages(np.zeros((count, 3, 2, 3), np.uint8), np.arange(count))


def labels(loader):
    return torch.cat([labels for _, labels in loader]).tolist()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_each_image_is_evaluated_by_one_process(world):
    shards = [
        labels(evaluation_loader(Shard(numbered(7), 0, rank, world), 2)) for rank in range(world)
    ]
    assert sorted(chain(*shards)) == list(range(7))
    assert shards == [list(range(rank, 7, world)) for rank in range(world)]


@pytest.mark.parametrize("read", [0, 1, 2])
def test_an_epoch_continues_after_the_batches_that_were_read(read):
    shard = Shard(numbered(19), rank=0, world_size=2)
    whole = training_loader(shard, 4, seed=5)
    whole.sampler.set_epoch(2)
    expected = labels(whole)
    batches = iter(whole)
    for _ in range(read):
        next(batches)
    assert whole.batches_read == (read or 3), "those of the epoch before until the next begins"
    resumed = training_loader(shard, 4, seed=5, first_batch=read)
    resumed.sampler.set_epoch(2)
    assert labels(resumed) == expected[4 * read :]
    assert resumed.batches_read == 3
    assert labels(resumed) == expected, "the next epoch is whole"


class Watch(Callback):
    """Notes epoch, number and sum of each batch."""

    def __init__(self):
        self.batches = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.batches.append((trainer.current_epoch, batch_idx, float(batch[0].sum())))


def overfit(folder, ckpt_path=None, **options):
    data = ShapesDataModule(train_images=60, test_images=10, batch_size=8, augment=STILL)
    watch = Watch()
    last = ModelCheckpoint(folder, save_last=True, every_n_train_steps=1)
    model = TransferClassifier("lenet5", "none", num_classes=10)
    callbacks = [watch, last]
    trainer = quiet_trainer(max_epochs=3, overfit_batches=3, callbacks=callbacks, **options)
    trainer.fit(model, data, ckpt_path=ckpt_path)
    return watch.batches, last.last_model_path, trainer


def test_the_epochs_of_overfit_batches_are_alike_and_go_on_after_the_batches_that_were_read(
    tmp_path,
):
    whole, _, trainer = overfit(tmp_path / "whole")
    sums = [total for _, _, total in whole]
    assert sums == sums[:3] * 3
    assert len(set(sums)) == 3
    before, last, _ = overfit(tmp_path / "stopped", max_steps=4)
    after, _, _ = overfit(tmp_path / "resumed", last)
    assert before + after == whole
    assert isinstance(trainer.train_dataloader.sampler, InOrder)


def test_processes_share_the_images_of_overfit_batches():
    shards = []
    for rank in range(2):
        shards.append(labels(training_loader(Shard(numbered(8), 0, rank, 2), 2, 0, shuffled=False)))
    assert shards == [[0, 2, 4, 6], [1, 3, 5, 7]]


@pytest.mark.slow
def test_two_processes_with_too_few_images_are_refused_before_training(tmp_path):
    done = run_fit(tmp_path, *DDP, "--data.test_images=1", expect=2, timeout=120)
    assert (
        "1 test images are too few for 2 processes, of which each needs 1: take fewer devices"
        in done.stderr
    )
    assert "Traceback" not in done.stderr
    assert "epoch" not in done.stdout


def test_a_process_needs_an_image_to_evaluate_and_two_to_train():
    images = {"train": numbered(8), "val": numbered(4), "test": numbered(3)}
    check_processes(images, 3)
    check_processes({"val": numbered(1), "test": numbered(1)}, 1)
    for world, message in (
        (4, "3 test images .* 4 processes, of which each needs 1"),
        (5, "8 train .* each needs 2"),
    ):
        with pytest.raises(UserError, match=message):
            check_processes(images, world)
    with pytest.raises(UserError, match="1 train images are too few for 1 process"):
        check_processes({"train": numbered(1)}, 1)


def test_one_process_takes_one_image():
    data = ShapesDataModule(train_images=50, test_images=1)
    data.prepare_data()
    data.setup()
    assert labels(data.test_dataloader()) == data.images["test"].labels.tolist()
