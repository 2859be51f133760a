"""The same images give the same probabilities in training, `evaluate`, `predict` and exports."""

import logging

import numpy as np
import pytest
import torch
from conftest import quiet_trainer
from PIL import Image

from cifar_transfer import BackboneFreeze, Classifier, ImageFolderDataModule, TransferClassifier
from cifar_transfer.base.errors import UserError
from cifar_transfer.commands.evaluate import evaluate
from cifar_transfer.commands.export import export
from cifar_transfer.data.geometry import STATISTICS, Geometry, choose_size, fit_image, resize
from cifar_transfer.data.images import read_image, read_size
from cifar_transfer.training.checkpoint_file import read_checkpoint
from cifar_transfer.training.collect_predictions import CollectPredictions
from cifar_transfer.training.evaluation import load_data

TINY = "shufflenet_v2_x0_5"


def write_folder(root, train=((32, 32), 6), test=((32, 32), 5), odd=()):
    """Write an image folder with two classes.

    Args:
        train: Size (width, height) of the training images, and their number for each class.
        test: The same of the test images.
        odd: Sizes of further training images of each class.
    """
    train_size, train_count = train
    test_size, test_count = test
    sizes = {"train": [train_size] * train_count + list(odd), "test": [test_size] * test_count}
    rng = np.random.default_rng(0)
    for split in sizes:
        for class_name in ("cat", "dog"):
            (root / split / class_name).mkdir(parents=True)
            for number, size in enumerate(sizes[split]):
                patches = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
                image = patches.resize(size, Image.Resampling.BICUBIC)
                image.save(root / split / class_name / f"{number}.png")
    return root


def fit(root, model=None, **options):
    """Train for two epochs, and save the checkpoint `best.ckpt` as a run does."""
    data = ImageFolderDataModule(
        str(root), batch_size=4, val_fraction=0.4, num_workers=0, **options
    )
    torch.manual_seed(0)
    network = TransferClassifier(
        TINY, "none", class_names=data.class_names, lr=0.05, **(model or {})
    )
    freeze = BackboneFreeze(unfreeze_epoch=0, unfrozen_lr=0.05)
    trainer = quiet_trainer(max_epochs=2, callbacks=[freeze])
    trainer.fit(network, data)
    spread_logits(network, data)
    trainer.save_checkpoint(root / "best.ckpt")
    return network


@torch.no_grad()
def spread_logits(network, data):
    """Change the head such that the logits have a deviation of 1. The short training does not."""
    images, _ = data.images["test"].__getitems__(range(10))
    logits = network.eval()(images / 255)
    head = network.network.fc
    head.weight /= logits.std(0)[:, None]
    head.bias.copy_((head.bias - logits.mean(0)) / logits.std(0))


# Images in the folder, options of the network, options of the data, and the size (height, width)
# that images are to be decoded to.
CASES = {
    "test images of another size": ({"test": ((50, 44), 5)}, {}, {}, (32, 32)),
    "one of 33 pixels among 32": ({"odd": [(33, 33)]}, {}, {}, (32, 32)),
    "one of 33 pixels, on the fly": ({"odd": [(33, 33)]}, {}, {"cache_limit_gb": 0}, (32, 32)),
    "mixed sizes": (
        {"train": ((40, 30), 3), "odd": [(50, 36), (33, 60), (41, 38)]},
        {},
        {},
        (33, 33),
    ),
    "mixed sizes, larger": (
        {"train": ((40, 30), 2), "odd": [(50, 36), (33, 60)]},
        {"image_size": 48},
        {},
        (48, 48),
    ),
    "rectangles": ({"train": ((48, 32), 6), "test": ((48, 32), 5)}, {}, {}, (32, 48)),
    "rectangles, on the fly": ({"train": ((48, 32), 6)}, {}, {"cache_limit_gb": 0}, (32, 48)),
    "rectangles, larger": (
        {"train": ((48, 32), 6), "test": ((48, 32), 5)},
        {"image_size": 48},
        {},
        (32, 32),
    ),
    "rectangles, smaller": ({"train": ((48, 37), 6)}, {"image_size": 32}, {}, (32, 32)),
    "larger input": ({}, {"image_size": 48}, {}, (32, 32)),
    "smaller input": ({"train": ((50, 64), 6)}, {"image_size": 32}, {}, (32, 32)),
    "decoded to a size": (
        {"train": ((50, 64), 6)},
        {"image_size": 40},
        {"decode_size": 48},
        (48, 48),
    ),
    "sizes of training": (
        {"train": ((60, 60), 6)},
        {"image_size": 32, "train_sizes": [40, 32]},
        {},
        (40, 40),
    ),
}
SAMPLE = ("rectangles, larger", "mixed sizes", "sizes of training")
MARKS = {name: pytest.mark.whole for name in CASES if name not in SAMPLE}
# The graphs of the other cases are not different.
EXPORTED = ("one of 33 pixels among 32", "rectangles", "rectangles, larger", "decoded to a size")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("images", "model", "data", "size"),
    [pytest.param(*CASES[name], id=name, marks=MARKS.get(name, ())) for name in CASES],
)
def test_the_same_images_give_the_same_everywhere(
    tmp_path, request, record_property, images, model, data, size
):
    trained = fit(write_folder(tmp_path, **images), model, **data)
    path = tmp_path / "best.ckpt"
    checkpoint = read_checkpoint(path)
    assert checkpoint["network"]["geometry"]["size"] == list(size)
    predicted = predict(path, tmp_path)
    assert predicted.std(0).min() > 0.05, "the images differ"

    collected = CollectPredictions()
    trainer = quiet_trainer(callbacks=[collected])
    trainer.test(
        TransferClassifier.load_from_checkpoint(path), load_data(checkpoint), verbose=False
    )
    assert_same(record_property, "test", predicted, collected.predictions.probabilities, 1e-5)
    loss = torch.nn.functional.nll_loss(predicted.log(), collected.predictions.labels)
    scores = evaluate(str(path), accelerator="cpu", figures=False)
    assert scores["test/loss"] == pytest.approx(float(loss), abs=1e-5)

    pixels = decode(tmp_path, size)
    with torch.no_grad():
        in_training = trained.eval()(pixels).softmax(1)
    assert_same(record_property, "training", predicted, in_training, 1e-5)
    if request.node.callspec.id in EXPORTED:
        export(str(path), "torch_export")
        graph = torch.export.load(path.with_suffix(".pt2")).module()
        exported = graph(pixels).detach().softmax(1)
        assert_same(record_property, "torch_export", predicted, exported, 1e-4)


@pytest.mark.whole
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "rectangles, larger" else pytest.mark.whole)
        for name in EXPORTED
    ],
)
def test_the_same_images_give_the_same_in_onnx(tmp_path, record_property, name):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is an optional extra")
    images, model, data, size = CASES[name]
    fit(write_folder(tmp_path, **images), model, **data)
    path = tmp_path / "best.ckpt"
    export(str(path), "onnx")
    session = onnxruntime.InferenceSession(
        path.with_suffix(".onnx"), providers=["CPUExecutionProvider"]
    )
    (logits,) = session.run(None, {"images": decode(tmp_path, size).numpy()})
    exported = torch.from_numpy(logits).softmax(1)
    assert_same(record_property, "onnx", predict(path, tmp_path), exported, 1e-4)


def files_of_test_images(root):
    return sorted((root / "test").rglob("*.png"))


def decode(root, size):
    """Return the test images of a folder as exported networks take them, float [B, 3, H, W]."""
    images = [torch.from_numpy(read_image(file, size)) for file in files_of_test_images(root)]
    return torch.stack(images) / 255


def predict(path, root):
    """Return the probabilities of `predict` for the test images of a folder, float [B, 2]."""
    rows = []
    for classes in Classifier.load(path, "cpu").predict(files_of_test_images(root), top_k=2):
        probabilities = dict(classes)
        rows.append([probabilities["cat"], probabilities["dog"]])
    return torch.tensor(rows)


def assert_same(record_property, name, predicted, probabilities, tolerance):
    difference = float((probabilities - predicted).abs().max())
    record_property(name, difference)
    assert difference < tolerance, name


def test_evaluation_decodes_to_the_size_of_training_even_if_the_images_were_replaced(tmp_path):
    fit(write_folder(tmp_path / "run"))
    path = tmp_path / "run" / "best.ckpt"
    other = write_folder(tmp_path / "other", ((50, 40), 4), ((60, 60), 3))
    data = load_data(read_checkpoint(path), root=str(other))
    quiet_trainer().test(TransferClassifier.load_from_checkpoint(path), data, verbose=False)
    for images in data.images.values():
        assert images[0][0].shape == (3, 32, 32)


@pytest.mark.parametrize(
    ("sizes", "largest", "size"),
    [
        ([(32, 32)] * 3, None, (32, 32)),
        ([(32, 48)] * 3, None, (32, 48)),
        ([(32, 48)] * 3 + [(33, 48)] * 2, None, (32, 48)),
        ([(200, 256)] * 3, None, (200, 256)),
        ([(200, 257)] * 3, None, (200, 200)),
        ([(300, 400)] * 3, None, (224, 224)),
        ([(40, 50), (50, 60), (90, 70)], None, (50, 50)),
        ([(32, 32)] * 3, 48, (32, 32)),
        ([(32, 48)] * 3, 48, (32, 32)),
        ([(32, 32)] * 3, 24, (24, 24)),
        ([(300, 400)] * 3, 96, (96, 96)),
        ([(300, 400)] * 3, 256, (256, 256)),
        ([(300, 400), (400, 300), (500, 500)], 256, (256, 256)),
        ([(40, 50), (50, 60), (90, 70)], 64, (64, 64)),
    ],
)
def test_the_size_that_images_are_decoded_to(sizes, largest, size):
    assert choose_size(sizes, largest) == size


def test_the_size_of_the_upright_image_is_read_from_the_header(tmp_path):
    image = Image.new("RGB", (50, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    for kind in ("png", "jpg", "webp"):
        image.save(tmp_path / f"x.{kind}", exif=exif)
        assert read_size(tmp_path / f"x.{kind}") == (50, 40), kind
    image.save(tmp_path / "plain.png")
    content = (tmp_path / "plain.png").read_bytes()
    (tmp_path / "plain.png").write_bytes(content[:60])  # the header without the pixels
    assert read_size(tmp_path / "plain.png") == (40, 50)
    with pytest.raises(UserError, match=r"plain\.png cannot be decoded"):
        read_image(tmp_path / "plain.png")


def test_an_image_of_the_right_size_is_not_changed():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8))
    assert fit_image(image, (32, 48)) is image
    assert fit_image(image, (48, 32)).size == (32, 48)


def test_rectangles_are_cut_not_squashed():
    images = torch.rand(2, 3, 20, 31)
    assert torch.equal(resize(images, 20), images[..., 6:26])  # as torchvision rounds
    assert torch.equal(resize(images, None), images)
    squashed = torch.nn.functional.interpolate(
        images, size=(24, 24), mode="bilinear", antialias=True
    )
    assert resize(images, 24).shape == (2, 3, 24, 24)
    assert not torch.allclose(resize(images, 24), squashed)


def test_what_is_done_to_images_is_logged_once(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    fit(write_folder(tmp_path / "a"))
    assert not any(message.startswith("Images ") for message in caplog.messages)
    fit(write_folder(tmp_path / "b", ((48, 37), 6), odd=[(40, 40)]), {"image_size": 40})
    messages = [message for message in caplog.messages if message.startswith("Images ")]
    assert messages == [
        "Images become 37 x 37 pixels when decoded, resized and cut to the centre: 14 of 14 "
        "looked at have another size (decode_size=N makes them N x N)",
        "Images of 37 x 37 are enlarged to 40 x 40 on the device.",
    ]


def test_data_that_were_set_up_before_are_decoded_again_for_a_network_that_takes_squares(tmp_path):
    root = write_folder(tmp_path, ((48, 32), 6))
    data = ImageFolderDataModule(str(root), batch_size=4, val_fraction=0.4)
    data.prepare_data()
    data.setup()
    assert data.image_size == (32, 48)
    network = TransferClassifier(TINY, "none", num_classes=2, image_size=24)
    quiet_trainer(max_steps=1, limit_val_batches=0).fit(network, data)
    assert data.image_size == (24, 24)
    assert network.classifier.geometry.size == (24, 24)


def test_other_images_than_a_checkpoint_was_trained_on_are_refused(tmp_path):
    fit(write_folder(tmp_path / "run"))
    path = tmp_path / "run" / "best.ckpt"
    other = str(write_folder(tmp_path / "other", ((48, 40), 6)))
    network = TransferClassifier(TINY, "none", num_classes=2)
    data = ImageFolderDataModule(other, val_fraction=0.4)
    message = "decoded to 32 x 32 .* give 48 x 40: give the data the same decode_size"
    with pytest.raises(UserError, match=message):
        quiet_trainer().test(network, data, ckpt_path=path, weights_only=True, verbose=False)
    data = ImageFolderDataModule(other, val_fraction=0.4, decode_size=32)
    quiet_trainer().test(network, data, ckpt_path=path, weights_only=True, verbose=False)
    assert data.image_size == (32, 32)


def test_plain_loaders_tell_the_size_and_leave_the_statistics_of_the_weights():
    images = torch.utils.data.TensorDataset(torch.rand(8, 3, 40, 56), torch.arange(8) % 2)
    batches = torch.utils.data.DataLoader(images, batch_size=4)
    network = TransferClassifier(TINY, "none", num_classes=2)
    quiet_trainer(max_epochs=1).fit(network, batches, batches)
    assert Classifier(network.classifier, "cpu").size == (40, 56)
    assert network.classifier.geometry.mean == STATISTICS["imagenet"][0]


@pytest.mark.parametrize(
    ("statistics", "backbone", "normalize", "expected"),
    [
        ("cifar10", TINY, None, "cifar10"),
        ("cifar10", TINY, "imagenet", "imagenet"),
        (None, TINY, None, "imagenet"),
        (None, TINY, "cifar10", "cifar10"),
        (None, "lenet5", None, "imagenet"),
    ],
)
def test_statistics_are_those_of_the_option_the_data_or_the_weights(
    tmp_path, statistics, backbone, normalize, expected
):
    root = write_folder(tmp_path)
    data = ImageFolderDataModule(str(root), batch_size=4, val_fraction=0.4)
    data.statistics = statistics
    network = TransferClassifier(backbone, "none", num_classes=2, normalize=normalize)
    trainer = quiet_trainer(max_steps=1, limit_val_batches=0)
    trainer.fit(network, data)
    trainer.save_checkpoint(tmp_path / "best.ckpt")
    loaded = TransferClassifier.load_from_checkpoint(tmp_path / "best.ckpt").classifier
    mean, std = STATISTICS[expected]
    assert (loaded.geometry.mean, loaded.geometry.std) == (mean, std)
    assert loaded.mean.flatten().tolist() == pytest.approx(list(mean))
    assert loaded.std.flatten().tolist() == pytest.approx(list(std))
    assert loaded.geometry == network.classifier.geometry


@pytest.mark.parametrize("inside", [True, False])
def test_the_words_about_a_geometry_name_every_step(inside):
    geometry = Geometry((32, 48), 24, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    description = geometry.describe(inside)
    words = description["preparation"]
    assert "resize it (to cover 48 x 32 pixels; bilinear, antialiased)" in words
    assert ("Cut out the centre square. Resize" in words) == (not inside)
    assert ("Subtract the mean" in words) == (not inside)
    assert ("mean" in description) == (not inside)
    assert description["geometry"]["input_size"] == ([32, 48] if inside else [24, 24])
