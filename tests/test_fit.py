"""How images of another shape are brought to one size: cropped, padded or stretched."""

import json

import numpy as np
import pytest
import torch
from conftest import RUN, run_fit
from PIL import Image, ImageOps

from cifar_transfer import Classifier, DatasetDataModule, ImageFolderDataModule
from cifar_transfer.base.errors import UserError
from cifar_transfer.data.geometry import Geometry, fit_image
from cifar_transfer.training.checkpoint_file import read_checkpoint


def noise(width, height):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("size", [(20, 60), (60, 20), (45, 45), (31, 32)])
@pytest.mark.parametrize("target", [(24, 24), (16, 40)])
def test_a_padded_and_a_stretched_image_are_pillows(size, target):
    image = noise(*size)
    height, width = target
    bilinear = Image.Resampling.BILINEAR
    padded = np.asarray(fit_image(image, target, "pad"), np.int16)
    expected = np.asarray(ImageOps.pad(image, (width, height), bilinear), np.int16)
    assert padded.shape == (height, width, 3)
    # Pillow rounds the place of the image otherwise where its sides are odd.
    shifts = [np.roll(expected, shift, axis) for axis in (0, 1) for shift in (-1, 0, 1)]
    assert min(np.abs(padded - shifted).mean() for shifted in shifts) < 1
    assert fit_image(image, target, "stretch") == image.resize((width, height), bilinear)
    assert fit_image(image, target) == ImageOps.fit(image, (width, height), bilinear)


def test_a_line_keeps_a_pixel():
    image = Image.new("RGB", (5000, 1), "white")
    padded = np.asarray(fit_image(image, (32, 32), "pad"))
    assert (padded.max(2) > 0).sum(0).tolist() == [1] * 32


@pytest.fixture(scope="module")
def long_images(tmp_path_factory):
    """Images of which the class is a mark at the left or the right end."""
    root = tmp_path_factory.mktemp("long")
    rng = np.random.default_rng(0)
    for split, count in (("train", 80), ("test", 30)):
        for name, columns in (("left", slice(0, 20)), ("right", slice(100, 120))):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(60, 120, (40, 120, 3), dtype=np.uint8)
                pixels[10:30, columns] = (250, 240, 20)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


JOB = [
    "--model.backbone=lenet5",
    "--model.weights=none",
    "--model.image_size=32",
    "--data=ImageFolderDataModule",
    "--data.augment=none",
    "--data.batch_size=32",
    "--data.val_fraction=0.2",
    "--freeze.unfreeze_epoch=0",
    "--report.figures=false",
    "--trainer.max_epochs=4",
    "--trainer.accelerator=cpu",
]


@pytest.mark.slow
@pytest.mark.parametrize(("fit", "lowest", "highest"), [("crop", 0.3, 0.7), ("pad", 0.95, 1.0)])
def test_marks_at_the_ends_are_seen_only_if_the_whole_image_is(
    tmp_path, long_images, fit, lowest, highest
):
    run_fit(tmp_path, *JOB, f"--data.root={long_images}", f"--data.fit={fit}")
    result = json.loads((tmp_path / RUN / "result.json").read_text())
    assert lowest <= result["best/test_acc"] <= highest
    best = tmp_path / RUN / "checkpoints" / "best.ckpt"
    assert read_checkpoint(best)["network"]["geometry"]["fit"] == fit
    files = sorted((long_images / "test").glob("*/*.png"))
    likeliest = Classifier.load(best, "cpu").predict([str(file) for file in files], top_k=1)
    correct = [
        file.parent.name == classes[0][0] for file, classes in zip(files, likeliest, strict=True)
    ]
    assert sum(correct) / len(correct) == pytest.approx(result["best/test_acc"])
    if fit == "pad":
        stretched = ["--trainer.max_epochs=5", "--data.fit=stretch"]
        done = run_fit(tmp_path, f"--resume={RUN}", *stretched, expect=2)
        assert "data.fit=stretch differs from pad" in done.stderr


def test_another_fit_makes_another_cache(long_images):
    pixels = {}
    for fit in ("crop", "pad", "stretch", "crop"):
        data = ImageFolderDataModule(str(long_images), decode_size=16, fit=fit)
        data.setup()
        image = data.images["test"][0][0]
        assert torch.equal(pixels.setdefault(fit, image), image)
    assert len({tuple(image.flatten().tolist()) for image in pixels.values()}) == 3


def test_datasets_have_it_too():
    images = [noise(20, 60)] * 40
    pairs = [(image, number % 2) for number, image in enumerate(images)]
    data = DatasetDataModule(pairs, decode_size=24, fit="pad")
    data.setup()
    expected = np.asarray(fit_image(images[0], (24, 24), "pad")).transpose(2, 0, 1)
    assert np.array_equal(data.images["train"][0][0].numpy(), expected)
    with pytest.raises(UserError, match="fit is squeeze: take crop, pad or stretch"):
        DatasetDataModule(pairs, fit="squeeze")


@pytest.mark.parametrize(
    ("fit", "words"),
    [
        ("crop", "cut out the centre, 32 x 32 pixels"),
        ("pad", "fit into 32 x 32 pixels (bilinear, antialiased), and add black"),
        ("stretch", "to 32 x 32 pixels whatever its shape"),
    ],
)
def test_an_export_says_how_images_are_fitted(fit, words):
    description = Geometry((32, 32), None, (0.5,) * 3, (0.5,) * 3, fit).describe(inside=True)
    assert words in description["preparation"]
    assert description["geometry"]["fit"] == fit
