"""Own images of more than 64 pixels: their augmentation, and the room that its crops have."""

import inspect
import json
import re
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import RUN, TINY, assert_same_weights, quiet_trainer, run_fit, write_images
from PIL import Image
from torchvision.models import shufflenet_v2_x0_5
from torchvision.transforms import functional

from cifar_transfer import (
    ArrayImages,
    Augment,
    CIFAR10DataModule,
    Classifier,
    DatasetDataModule,
    ImageDataModule,
    ImageFolderDataModule,
    TransferClassifier,
)
from cifar_transfer.base.errors import UserError
from cifar_transfer.cli.fit_cli import FitCLI
from cifar_transfer.data.augment import PRESETS, Augmentation
from cifar_transfer.data.cifar import CLASSES
from cifar_transfer.data.geometry import size_with_room
from cifar_transfer.data.images import read_image
from cifar_transfer.data.resampling import draw_crops
from cifar_transfer.features.extract import FeatureExtractor, extract_features
from cifar_transfer.training import lightning_internals
from cifar_transfer.training.evaluation import load_data
from cifar_transfer.training.report import augmented_images

PHOTOS = PRESETS["photos"]
CIFAR = PRESETS["cifar"]
SIDE = 80  # pixels, of images that are files of 100 x 120
ROOM = 92  # 1.15 times as much


class Arrays(ImageDataModule):
    """A user's own data module, which has no options of its own."""

    class_names = ("cat", "dog")
    side = 65

    def load(self, split):
        if split == "val":
            return None
        images = np.random.default_rng(0).integers(
            0, 256, (40, 3, self.side, self.side), dtype=np.uint8
        )
        return ArrayImages(images, np.arange(40) % 2)


class Parsed(FitCLI):
    """What `fit` makes of its options, before anything is made of them."""

    def before_instantiate_classes(self):
        pass

    instantiate_classes = before_instantiate_classes


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Files of 120 x 100 pixels."""
    root = tmp_path_factory.mktemp("photos")
    write_images(root / "train", 12, (120, 100))
    return root


def ready(root, side=SIDE, **options):
    data = ImageFolderDataModule(
        str(root), decode_size=side, num_workers=0, batch_size=4, **options
    )
    data.prepare_data()
    data.setup("fit")
    return data


def training_size(data):
    images, _ = next(iter(data.train_dataloader()))
    return tuple(images.shape[2:])


@pytest.mark.parametrize(("side", "expected"), [(64, CIFAR), (65, PHOTOS)])
def test_the_augmentation_is_chosen_by_the_size_of_the_images(photos, side, expected):
    assert ready(photos, side).augmentation == expected
    own = Arrays()
    own.side = side
    own.setup()
    assert own.augmentation == expected
    images = [Image.new("RGB", (90, 70), (shade, 0, 0)) for shade in range(20)]
    pairs = [(image, row % 2) for row, image in enumerate(images)]
    dataset = DatasetDataModule(pairs, decode_size=side)
    dataset.setup()
    assert dataset.augmentation == expected


@pytest.mark.parametrize("image_size", [None, 32, 96])
def test_cifar10_has_its_own_augmentation_whatever_the_network_takes(tmp_path, image_size):
    write_images(tmp_path / "train", 2, classes=CLASSES)
    write_images(tmp_path / "test", 1, classes=CLASSES)
    data = CIFAR10DataModule(str(tmp_path), batch_size=4, val_fraction=0.5)
    network = TransferClassifier(
        "squeezenet1_1", "none", class_names=data.class_names, image_size=image_size
    )
    quiet_trainer(max_steps=1, limit_val_batches=1).fit(network, data)
    assert data.augmentation == CIFAR
    assert training_size(data) == (32, 32)


@pytest.mark.parametrize("preset", ["cifar", "photos"])
def test_the_help_tells_the_values_of_the_presets(preset):
    text = " ".join(inspect.getdoc(Augment).split())
    for name, value in asdict(PRESETS[preset]).items():
        (told,) = re.findall(rf" {name}: [A-Z\"].*?\(cifar: (.*?), photos: (.*?)\)", text)
        assert told[preset == "photos"] == str(value), name


def test_options_that_are_given_stand_on_the_preset_of_the_size(photos):
    given = Augment(erase=0.25, flip=0.5)
    assert ready(photos, 96, augment=given).augmentation == Augmentation(
        **asdict(PHOTOS) | {"erase": 0.25, "flip": 0.5}
    )
    assert ready(photos, 48, augment=given).augmentation == Augmentation(erase=0.25)
    nothing = Augment(preset="none", degrees=5)
    assert ready(photos, 96, augment=nothing).augmentation == Augmentation(
        **asdict(PRESETS["none"]) | {"degrees": 5}
    )
    with pytest.raises(UserError, match="preset is foto; take cifar, photos, none"):
        Augment(preset="foto")


@pytest.mark.parametrize(
    ("options", "augment"),
    [
        ([], Augment()),
        (["--data.augment.erase=0.25"], Augment(erase=0.25)),
        (["--data.augment=photos", "--data.augment.padding=4"], Augment(4, preset="photos")),
        (["--data.augment.erase=0.5", "--data.augment=none"], Augment(preset="none")),
        (["--config=fast", "--data.augment=photos"], Augment(preset="photos")),
    ],
    ids=["default", "option alone", "option behind a preset", "preset behind an option", "recipe"],
)
def test_the_command_line_tells_what_is_given_from_what_is_not(monkeypatch, options, augment):
    monkeypatch.setattr("sys.argv", ["fit"])
    parsed = Parsed(options).config.data.init_args.augment.as_dict()
    assert Augment(**parsed) == augment


def test_the_recipe_takes_other_options_and_images_from_elsewhere(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()  # no obstacle to a recipe of the same name
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["fit"])
    recipe = ["--config", "photos"]
    config = Parsed([*recipe, "--data.root=photos", "--data.augment.erase=0.25"]).config
    assert config.data.class_path == "cifar_transfer.ImageFolderDataModule"
    assert config.freeze.probe
    augment = config.data.init_args.augment.as_dict()
    assert Augment(**augment) == Augment(preset="photos", erase=0.25)
    table = ["--data=TableDataModule", "--data.train=train.csv", "--model.image_size=224"]
    config = Parsed([*recipe, *table]).config
    assert config.data.class_path == "cifar_transfer.TableDataModule"
    assert config.data.init_args.batch_size == 16
    assert config.data.init_args.augment.preset == "photos"
    assert config.model.image_size == 224


@pytest.mark.slow
def test_the_recipe_trains_from_the_head_of_probe(photos, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # where features may be already
    torch.save(shufflenet_v2_x0_5().state_dict(), tmp_path / "weights.pth")
    small = [
        "--model.backbone=shufflenet_v2_x0_5",
        "--model.weights=weights.pth",
        "--model.image_size=72",
    ]
    cheap = ["--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--report.figures=false"]
    done = run_fit(tmp_path, "--config=photos", f"--data.root={photos}", *small, *cheap)
    assert "Features of 24 images" in done.stderr
    assert "Training images are also kept at 83 x 83 pixels" in done.stderr
    assert "everything, 343,842 parameters train" in done.stdout


def test_training_images_have_room_for_crops_and_no_others(photos):
    data = ready(photos)
    assert training_size(data) == (ROOM, ROOM)
    images, _ = next(iter(data.train_dataloader()))
    assert data.augmented(images).shape == (4, 3, SIDE, SIDE)
    assert augmented_images(data, None)[0].shape[2:] == (SIDE, SIDE)
    assert data.image_size == (SIDE, SIDE)
    for split in ("train", "val"):
        assert data.images[split][0][0].shape == (3, SIDE, SIDE)


def test_they_are_the_same_images_in_the_same_order(photos):
    """Those held out for validation are not among them."""
    with_room = ready(photos)
    without = ready(photos, augment=Augment(preset="none"))
    larger = with_room.shard("train", training=True).images
    plain = without.shard("train", training=True).images
    assert len(larger) == len(plain) < 24
    assert larger.labels.tolist() == plain.labels.tolist()
    for row in range(len(plain)):
        image = functional.resize(larger[row][0].float(), [SIDE, SIDE], antialias=True)
        difference = (image - plain[row][0].float()).abs().mean()
        assert difference < 15  # of 256; between two images it is 40


@pytest.mark.parametrize(
    "augment",
    [
        Augment(preset="cifar"),
        Augment(preset="none"),
        Augment(crop_scale=[1, 1]),
    ],
    ids=["cifar", "none", "the whole image"],
)
def test_without_crops_of_parts_there_is_no_room(photos, augment):
    data = ready(photos, augment=augment)
    assert training_size(data) == (SIDE, SIDE)
    images, _ = next(iter(data.train_dataloader()))
    assert data.augmented(images).shape == (4, 3, SIDE, SIDE)


def test_small_files_have_no_room(tmp_path):
    """What is cut out of CIFAR-10's images is enlarged from what there is."""
    write_images(tmp_path / "train", 6, (80, 80))
    assert training_size(ready(tmp_path)) == (SIDE, SIDE)
    assert not list(tmp_path.glob(".cifar_transfer/train-larger*"))
    images = [Image.new("RGB", (32, 32), (shade, 0, 0)) for shade in range(20)]
    small = [(image, row % 2) for row, image in enumerate(images)]
    data = DatasetDataModule(small, augment=Augment(crop_scale=[0.5, 1.0]), batch_size=4)
    data.setup()
    assert training_size(data) == (32, 32)


@pytest.mark.parametrize(
    ("size", "files", "fit", "expected"),
    [
        ((224, 224), [(3000, 4000)], "crop", (258, 258)),
        ((224, 224), [(230, 4000)], "crop", (230, 230)),
        ((224, 224), [(230, 4000)], "stretch", (230, 230)),
        ((224, 224), [(230, 4000)], "pad", (258, 258)),
        ((224, 224), [(100, 200)], "pad", (224, 224)),
        ((224, 224), [(230, 300), (50, 50), (900, 900)], "crop", (230, 230)),
        ((96, 64), [(960, 640)], "crop", (110, 74)),
        ((32, 32), [(32, 32)], "crop", (32, 32)),
    ],
)
def test_room_is_what_the_files_have(size, files, fit, expected):
    assert size_with_room(size, files, fit) == expected


@pytest.mark.parametrize("fit", ["pad", "stretch"])
def test_room_is_fitted_in_the_same_way(photos, fit):
    data = ready(photos, fit=fit, augment=Augment(preset="photos"))
    image, _ = data.shard("train", training=True).images[0]
    assert image.shape == (3, ROOM, ROOM)
    has_bars = bool((image[:, :5] == 0).all() and (image[:, -5:] == 0).all())
    assert has_bars == (fit == "pad")


def test_crops_of_larger_images_are_torchvisions():
    images = torch.randint(0, 256, (6, 3, ROOM, ROOM + 8), dtype=torch.uint8)
    only_crops = Augmentation(
        **asdict(PRESETS["none"]) | {"crop_scale": [0.35, 1.0], "interpolation": "bilinear"}
    )
    torch.manual_seed(0)
    result = only_crops(images, (SIDE, SIDE + 4))
    torch.manual_seed(0)
    only_crops.draw(6)
    crops = draw_crops(6, (ROOM, ROOM + 8), [0.35, 1.0], only_crops.crop_ratio).int().tolist()
    for image, crop, cropped in zip(images, crops, result, strict=True):
        expected = functional.resized_crop(
            image.float() / 255, *crop, [SIDE, SIDE + 4], antialias=False
        )
        torch.testing.assert_close(cropped, expected, atol=1e-4, rtol=0)


def test_larger_images_may_be_decoded_on_the_fly(photos, capsys):
    """The limit holds for each array of images by itself."""
    limit = 3 * SIDE * SIDE * 24 * 1.1e-9
    data = ready(photos, cache_limit_gb=limit)
    images = data.shard("train", training=True).images
    assert images.on_the_fly
    assert not data.images["train"].on_the_fly
    cached = ready(photos).shard("train", training=True).images
    assert torch.equal(images[3][0], cached[3][0])


def features(root, folder, **options):
    data = ImageFolderDataModule(str(root), decode_size=SIDE, num_workers=0, **options)
    torch.manual_seed(0)
    model = TransferClassifier("shufflenet_v2_x0_5", "none", class_names=data.class_names)
    trainer = quiet_trainer(use_distributed_sampler=False)
    extractor = FeatureExtractor(model.classifier, data, folder, test=False)

    def settle():
        lightning_internals.attach(trainer, model, data)
        model.setup("test")

    return extract_features(trainer, extractor, settle)


def test_features_do_not_see_the_room(photos, tmp_path):
    with_room = features(photos, tmp_path / "room")
    without = features(photos, tmp_path / "none", augment=Augment(preset="none"))
    for split in ("train", "val"):
        assert np.array_equal(with_room[split].views[0], without[split].views[0])


FIT = [
    *TINY[:2],
    "--trainer.accelerator=cpu",
    "--report.figures=false",
    "--data=ImageFolderDataModule",
    "--data.batch_size=8",
    "--data.decode_size=80",
    "--freeze.unfreeze_epoch=0",
    "--data.augment.erase=0.25",
]
LAST = "checkpoints/last.ckpt"


@pytest.fixture(scope="module")
def whole(tmp_path_factory, photos):
    """A run of two epochs that was never stopped, and what it has printed."""
    folder = tmp_path_factory.mktemp("whole")
    options = [*FIT, f"--data.root={photos}", "--trainer.max_epochs=2"]
    done = run_fit(folder, *options)
    return folder / RUN, done.stderr


@pytest.mark.slow
def test_a_run_says_and_stores_what_was_chosen_and_continues_with_it(photos, whole, tmp_path):
    run, printed = whole
    lines = printed.splitlines()
    augmentation = "Augmentation: photos, because images have 80 x 80 pixels, more than 64"
    assert sum(line.startswith(augmentation) for line in lines) == 1
    room = "Training images are also kept at 92 x 92 pixels"
    assert sum(line.startswith(room) for line in lines) == 1
    options = [*FIT, f"--data.root={photos}", "--trainer.max_epochs=2", "--trainer.max_steps=4"]
    run_fit(tmp_path, *options)
    last = tmp_path / RUN / LAST
    checkpoint = torch.load(last, weights_only=True)
    stored = checkpoint["datamodule_hyper_parameters"]["augment"]
    assert stored == asdict(PHOTOS) | {"erase": 0.25, "preset": "photos"}
    assert checkpoint["global_step"] == 4  # in the middle of the second epoch
    done = run_fit(tmp_path, f"--resume={RUN}", "--trainer.max_steps=-1")
    assert "Augmentation:" not in done.stderr
    assert_same_weights(last, run / LAST)


@pytest.mark.slow
def test_another_augmentation_is_refused_in_a_resume(whole, monkeypatch):
    run, _ = whole
    monkeypatch.setattr("sys.argv", ["fit"])
    with pytest.raises(UserError, match=r"data\.augment\.erase=0\.5 differs from 0\.25"):
        FitCLI([f"--resume={run}", "--data.augment.erase=0.5"])


@pytest.mark.slow
def test_what_training_does_to_its_images_is_not_done_to_those_that_are_predicted(photos, whole):
    run, _ = whole
    checkpoint = run / "checkpoints/best.ckpt"
    classifier = Classifier.load(checkpoint, "cpu")
    assert classifier.size == (SIDE, SIDE)
    data = load_data(torch.load(checkpoint, weights_only=True), num_workers=0)
    data.setup()
    names = data.names_of_images("val")
    assert names
    correct = 0
    for row, name in enumerate(names):
        expected = read_image(photos / name, (SIDE, SIDE))
        assert np.array_equal(data.images["val"][row][0], expected)
        ((label, _),) = classifier.predict(photos / name, top_k=1)
        correct += label == name.split("/")[1]
    result = json.loads((run / "result.json").read_text())
    assert result["best/val_acc"] == pytest.approx(correct / len(names))


def test_probe_decodes_to_the_size_that_a_fit_decodes_to(photos, tmp_path):
    data = ImageFolderDataModule(str(photos), num_workers=0)
    trainer = quiet_trainer(use_distributed_sampler=False)
    network = TransferClassifier(
        "shufflenet_v2_x0_5", "none", class_names=data.class_names, image_size=72
    )
    extractor = FeatureExtractor(network.classifier, data, tmp_path, test=False)

    def settle():
        lightning_internals.attach(trainer, network, data)
        network.setup("test")

    extract_features(trainer, extractor, settle)
    assert network.classifier.geometry.size == (72, 72)
