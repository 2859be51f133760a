"""Transforms of single training images: torchvision's by name, or any functions."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import RUN, TINY, assert_same_weights, run_fit
from torchvision.transforms import v2

from cifar_transfer import ArrayImages, ShapesDataModule
from cifar_transfer.base.errors import UserError
from cifar_transfer.data.loading import Shard, training_loader
from cifar_transfer.data.transformed_images import TransformedImages

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 3, 16, 24), dtype=np.uint8)
IMAGES = ArrayImages(PIXELS, np.arange(20) % 2)
TRANSFORMS = {
    "RandAugment": v2.RandAugment(),
    "AugMix": v2.AugMix(),
    "TrivialAugmentWide": v2.TrivialAugmentWide(),
    "a vertical flip": v2.RandomVerticalFlip(0.5),
    "a crop": v2.RandomResizedCrop((16, 24)),
    "NumPy's chance": lambda image: image // int(np.random.randint(1, 50)),
    "Python's chance": lambda image: image // random.randint(1, 50),
}


def epochs(workers, transforms, seed=0, balanced=False):
    """Return the images of two epochs, each sorted by the sampler's rows."""
    images = TransformedImages(IMAGES, transforms, seed)
    loader = training_loader(Shard(images, workers), 6, seed=1, balanced=balanced)
    result = []
    for epoch in (0, 1):
        loader.sampler.set_epoch(epoch)
        result.append(torch.cat([pixels for pixels, _ in loader]))
    return result


@pytest.mark.parametrize("name", TRANSFORMS)
def test_chance_follows_from_seed_epoch_and_image(name):
    transforms = [TRANSFORMS[name]]
    images = TransformedImages(IMAGES, transforms, seed=3)
    rows = list(range(20))
    before = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    first, labels = images.__getitems__(rows)
    after = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    assert first.dtype == torch.uint8
    assert labels.tolist() == IMAGES.labels.tolist()
    backwards, _ = images.__getitems__(rows[::-1])
    assert torch.equal(backwards.flip(0), first)
    next_epoch, _ = images.__getitems__([20 + row for row in rows])
    other_seed, _ = TransformedImages(IMAGES, transforms, seed=4).__getitems__(rows)
    for other in (next_epoch, other_seed, torch.from_numpy(PIXELS)):
        assert not torch.equal(other, first)


@pytest.mark.parametrize("balanced", [False, True])
def test_workers_draw_what_the_process_itself_draws(balanced):
    transforms = [v2.TrivialAugmentWide()]
    alone = epochs(0, transforms, balanced=balanced)
    with_workers = epochs(2, transforms, balanced=balanced)
    for one, other in zip(alone, with_workers, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("transform", "words"),
    [
        (v2.ToDtype(torch.float32, scale=True), "ToDtype.* makes float32 .* leave type and shape"),
        (v2.Resize((8, 8)), r"Resize.* makes uint8 \[3, 8, 8\] of uint8 \[3, 16, 24\]"),
        (v2.ToPILImage(), "ToPILImage.* makes a Image of uint8"),
    ],
)
def test_what_makes_no_such_image_is_refused_before_training(transform, words):
    with pytest.raises(UserError, match=words):
        TransformedImages(IMAGES, [transform], seed=0)


def test_only_training_images_are_transformed():
    data = ShapesDataModule(train_images=60, test_images=20, transforms=[lambda image: image // 2])
    data.setup()
    plain = ShapesDataModule(train_images=60, test_images=20)
    plain.setup()
    for split in ("train", "val", "test"):
        expected = plain.shard(split).images[0][0]
        assert torch.equal(data.shard(split).images[0][0], expected), "features are of these"
    pixels, _ = next(iter(data.train_dataloader()))
    brightest = {int(pixels.max()) for pixels, _ in plain.train_dataloader()}
    assert int(pixels.max()) <= max(brightest) // 2
    pixels, _ = next(iter(data.val_dataloader()))
    assert torch.equal(pixels, next(iter(plain.val_dataloader()))[0])
    assert data.hparams["transforms"] == [
        "test_only_training_images_are_transformed.<locals>.<lambda>"
    ]


@pytest.mark.slow
def test_a_run_with_transforms_is_stopped_resumed_and_evaluated(tmp_path):
    transforms = [
        {"class_path": "torchvision.transforms.v2.TrivialAugmentWide"},
        {"class_path": "torchvision.transforms.v2.RandomVerticalFlip", "init_args": {"p": 0.3}},
    ]
    job = [
        *TINY,
        "--model.backbone=lenet5",
        "--freeze.unfreeze_epoch=0",
        "--data.num_workers=1",
        f"--data.transforms={json.dumps(transforms)}",
    ]
    for folder in ("whole", "stopped", "without"):
        (tmp_path / folder).mkdir()
    run_fit(tmp_path / "whole", *job, "--trainer.max_epochs=2")
    run_fit(tmp_path / "stopped", *job, "--trainer.max_epochs=2", "--trainer.max_steps=8")
    run_fit(tmp_path / "stopped", f"--resume={RUN}", "--trainer.max_steps=-1")
    last = Path(RUN, "checkpoints", "last.ckpt")
    assert_same_weights(tmp_path / "whole" / last, tmp_path / "stopped" / last)
    run_fit(tmp_path / "whole", f"--ckpt={last}", "--accelerator=cpu", command="evaluate")
    done = run_fit(
        tmp_path / "stopped",
        f"--resume={RUN}",
        "--trainer.max_epochs=3",
        "--data.transforms=null",
        expect=2,
    )
    assert "data.transforms=null differs from" in done.stderr
