"""The same images give the same probabilities while training, in `evaluate`, in `predict` and in an exported graph."""

import logging
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from conftest import quiet_trainer
from PIL import Image

from cifar_transfer import BackboneFreeze, Classifier, ImageFolderDataModule, TransferClassifier
from cifar_transfer.base.errors import UserError
from cifar_transfer.commands.evaluate import evaluate
from cifar_transfer.commands.export import export
from cifar_transfer.data.geometry import Geometry, choose_size, cover, resize
from cifar_transfer.data.images import read_image, read_size
from cifar_transfer.data.module import EarlierRun
from cifar_transfer.results.collect import CollectPredictions
from cifar_transfer.training.checkpoint_file import read_checkpoint
from cifar_transfer.training.evaluation import load_data

TINY = "shufflenet_v2_x0_5"


def folder(root, train=((32, 32), 6), test=((32, 32), 5), odd=()):
    """Images of these sizes (width, height), so many a class, and further training images of odd sizes."""
    rng = np.random.default_rng(0)
    sizes = {"train": [train[0]] * train[1] + list(odd), "test": [test[0]] * test[1]}
    for split, name in product(sizes, ("cat", "dog")):
        (root / split / name).mkdir(parents=True)
        for number, size in enumerate(sizes[split]):
            patches = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
            Image.fromarray(patches).resize(size, Image.Resampling.BICUBIC).save(
                root / split / name / f"{number}.png"
            )
    return root


def fit(root, model=None, **options):
    """Two steps, as of a whole run, and the checkpoint."""
    data = ImageFolderDataModule(
        str(root), batch_size=4, val_fraction=0.4, num_workers=0, **options
    )
    torch.manual_seed(0)
    network = TransferClassifier(
        TINY, "none", class_names=data.class_names, lr=0.05, **(model or {})
    )
    trainer = quiet_trainer(
        max_epochs=2, callbacks=[BackboneFreeze(unfreeze_epoch=0, unfrozen_lr=0.05)]
    )
    trainer.fit(network, data)
    tell_apart(network, data)
    trainer.save_checkpoint(root / "best.ckpt")
    return network


@torch.no_grad()
def tell_apart(network, data):
    """Have the head give images of one class other logits, of deviation 1: so short a training does not."""
    pixels, _ = data.images["test"].__getitems__(range(10))
    logits, head = network.eval()(pixels / 255), network.network.fc
    head.weight /= logits.std(0)[:, None]
    head.bias.copy_((head.bias - logits.mean(0)) / logits.std(0))


# What the folder holds, the options of network and data, and to what size images are to be decoded.
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
# Of the others the graphs are no different.
EXPORTED = ("one of 33 pixels among 32", "rectangles", "rectangles, larger", "decoded to a size")
WHOLE = [
    pytest.param(
        *case, id=f"{name}, onnx", marks=pytest.mark.whole if name != "rectangles, larger" else ()
    )
    for name, case in CASES.items()
    if name in EXPORTED
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("images", "model", "data", "size"),
    [*(pytest.param(*case, id=name) for name, case in CASES.items()), *WHOLE],
)
def test_the_same_images_give_the_same_everywhere(
    tmp_path, request, record_property, images, model, data, size
):
    name = request.node.callspec.id
    trained = fit(folder(tmp_path / "run", **images), model, **data)
    ckpt = tmp_path / "run" / "best.ckpt"
    assert read_checkpoint(ckpt)["input_size"] == list(size)
    model, collected = TransferClassifier.load_from_checkpoint(ckpt), CollectPredictions()
    quiet_trainer(callbacks=[collected]).test(
        model, load_data(read_checkpoint(ckpt)), verbose=False
    )
    seen = collected.predictions
    files = sorted((tmp_path / "run" / "test").rglob("*.png"))
    classifier = Classifier.load(ckpt, "cpu")
    said = [dict(classes) for classes in classifier.predict(files, top_k=2)]
    shares = torch.tensor([[row[name] for name in seen.names] for row in said])
    assert shares.std(0).min() > 0.05, "images that differ"
    worst = {"predict": float((shares - seen.probabilities).abs().max())}
    loss = float(torch.nn.functional.nll_loss(shares.log(), seen.labels))
    assert evaluate(str(ckpt), accelerator="cpu", figures=False)["test/loss"] == pytest.approx(
        loss, abs=1e-5
    )
    pixels = torch.stack([torch.from_numpy(read_image(file, size)) for file in files]) / 255
    with torch.no_grad():
        worst["training"] = float((trained.eval()(pixels).softmax(1) - shares).abs().max())
    if name in EXPORTED:
        export(str(ckpt), "torch_export")
        graph = torch.export.load(ckpt.with_suffix(".pt2")).module()
        worst["torch_export"] = float((graph(pixels).detach().softmax(1) - shares).abs().max())
    if name.endswith("onnx"):
        onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is an optional extra")
        export(str(ckpt), "onnx")
        session = onnxruntime.InferenceSession(
            ckpt.with_suffix(".onnx"), providers=["CPUExecutionProvider"]
        )
        logits = torch.from_numpy(session.run(None, {"images": pixels.numpy()})[0])
        worst["onnx"] = float((logits.softmax(1) - shares).abs().max())
    for name, difference in worst.items():
        record_property(name, difference)
        assert difference < (1e-5 if name in ("predict", "training") else 1e-4), name


def test_evaluation_and_prediction_do_not_ask_the_images_again(tmp_path):
    """The folder has been replaced by one of other images since."""
    fit(folder(tmp_path / "run"))
    checkpoint = read_checkpoint(tmp_path / "run" / "best.ckpt")
    other = folder(tmp_path / "other", ((50, 40), 4), ((60, 60), 3))
    data = load_data(checkpoint, root=str(other))
    quiet_trainer().test(
        TransferClassifier.load_from_checkpoint(tmp_path / "run" / "best.ckpt"), data, verbose=False
    )
    assert {images[0][0].shape for images in data.images.values()} == {(3, 32, 32)}


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
def test_what_size_images_are_decoded_to(sizes, largest, size):
    assert choose_size(sizes, largest) == size


def test_a_size_is_read_from_the_header_and_upright(tmp_path):
    image = Image.new("RGB", (50, 40))
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("png", "jpg", "webp"):
        image.save(tmp_path / f"x.{kind}", exif=exif)
        assert read_size(tmp_path / f"x.{kind}") == (50, 40), kind
    image.save(tmp_path / "plain.png")
    whole = (tmp_path / "plain.png").read_bytes()
    (tmp_path / "plain.png").write_bytes(whole[:60])  # its pixels are not looked at
    assert read_size(tmp_path / "plain.png") == (40, 50)
    with pytest.raises(UserError, match=r"plain\.png cannot be decoded"):
        read_image(tmp_path / "plain.png")


def test_an_image_of_the_right_size_is_taken_as_it_is():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8))
    assert cover(image, (32, 48)) is image
    assert cover(image, (48, 32)).size == (32, 48)


def test_rectangles_are_cut_not_squashed():
    images = torch.rand(2, 3, 20, 31)
    assert torch.equal(resize(images, 20), images[..., 6:26])  # as torchvision rounds
    assert torch.equal(resize(images, None), images)
    assert resize(images, 24).shape == resize(images, 24, stretch=True).shape == (2, 3, 24, 24)
    assert not torch.allclose(resize(images, 24), resize(images, 24, stretch=True))


def told(caplog):
    return [
        record.getMessage()
        for record in caplog.records
        if record.getMessage().startswith("Images ")
    ]


def test_what_is_done_to_images_is_said_once(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    fit(folder(tmp_path / "a"))
    assert not told(caplog), "nothing"
    fit(folder(tmp_path / "b", ((48, 37), 6), odd=[(40, 40)]), {"image_size": 40})
    assert told(caplog) == [
        "Images become 37 x 37 pixels when decoded, resized and cut to the centre: 14 of 14 looked at have another "
        "size (decode_size=N makes them N x N)",
        "Images of 37 x 37 are enlarged to 40 x 40 on the device.",
    ]


def test_data_that_were_set_up_alone_are_decoded_again_for_a_network_that_asks_for_squares(
    tmp_path,
):
    data = ImageFolderDataModule(
        str(folder(tmp_path, ((48, 32), 6))), batch_size=4, val_fraction=0.4
    )
    data.prepare_data()
    data.setup()
    assert data.image_size == (32, 48)
    network = TransferClassifier(TINY, "none", num_classes=2, image_size=24)
    quiet_trainer(max_steps=1, limit_val_batches=0).fit(network, data)
    assert data.image_size == network.geometry.size == (24, 24)


def old(checkpoint, **changes):
    """As before checkpoints had a geometry."""
    del checkpoint["geometry"]
    return checkpoint | changes


def test_an_old_checkpoint_is_evaluated_as_it_was_trained(tmp_path):
    """It was trained on rectangles, squashed to squares on the device."""
    fit(folder(tmp_path, ((48, 32), 6), ((48, 32), 5)), {"image_size": 48})
    checkpoint = old(read_checkpoint(tmp_path / "best.ckpt"), input_size=[32, 48])
    torch.save(checkpoint, tmp_path / "old.ckpt")
    model, data = (
        TransferClassifier.load_from_checkpoint(tmp_path / "old.ckpt"),
        load_data(checkpoint),
    )
    trainer = quiet_trainer()
    trainer.test(model, data, verbose=False)
    assert data.image_size == Classifier(model, "cpu").size == (32, 48)
    images = torch.rand(2, 3, 32, 48)
    squashed = torch.nn.functional.interpolate(
        images, size=(48, 48), mode="bilinear", antialias=True
    )
    with torch.no_grad():
        assert torch.equal(model(images), model(squashed))
    trainer.save_checkpoint(tmp_path / "again.ckpt")
    assert Geometry.of(read_checkpoint(tmp_path / "again.ckpt")) == Geometry.of(checkpoint)


def test_an_old_run_goes_on_as_it_began(tmp_path, monkeypatch):
    """It decoded at 40 pixels what is now decoded at 24."""
    from cifar_transfer.cli.fit_cli import FitCLI

    monkeypatch.chdir(tmp_path)
    fit(folder(tmp_path / "photos", ((60, 40), 6)), {"image_size": 24})
    checkpoint = old(read_checkpoint("photos/best.ckpt"), input_size=[40, 40])
    checkpoint["datamodule_hyper_parameters"]["root"] = "photos"
    torch.save(checkpoint, "old.ckpt")
    options = [
        f"--model.backbone={TINY}",
        "--model.image_size=24",
        "--trainer.accelerator=cpu",
        "--ckpt_path=old.ckpt",
    ]
    options += [
        "--data=ImageFolderDataModule",
        "--data.root=photos",
        "--data.val_fraction=0.4",
        "--model.lr=0.05",
    ]
    assert FitCLI(options).datamodule._earlier.size == (40, 40)
    assert FitCLI([*options, "--data.decode_size=32"]).datamodule._earlier.size is None


def test_other_images_than_a_checkpoint_was_trained_on_are_refused(tmp_path):
    fit(folder(tmp_path / "run"))
    data = ImageFolderDataModule(str(folder(tmp_path / "other", ((48, 40), 6))), val_fraction=0.4)
    network = TransferClassifier(TINY, "none", num_classes=2)
    ckpt = tmp_path / "run" / "best.ckpt"
    with pytest.raises(
        UserError,
        match=r"decoded to 32 x 32 .* give 48 x 40: give the data the same decode_size",
    ):
        quiet_trainer().test(network, data, ckpt_path=ckpt, weights_only=True, verbose=False)
    data.continue_from(EarlierRun(size=(32, 32)))
    quiet_trainer().test(network, data, ckpt_path=ckpt, weights_only=True, verbose=False)
    assert data.image_size == (32, 32)


def test_loaders_of_somebody_elses_tell_the_size_too():
    batches = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.rand(8, 3, 40, 56), torch.arange(8) % 2), batch_size=4
    )
    network = TransferClassifier(TINY, "none", num_classes=2)
    quiet_trainer(max_epochs=1).fit(network, batches, batches)
    assert Classifier(network, "cpu").size == (40, 56)
    assert network.hparams["normalize"] == [[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]


@pytest.mark.parametrize(
    ("statistics", "backbone", "asked", "resolved"),
    [
        ("cifar10", TINY, None, "cifar10"),
        ("cifar10", TINY, "imagenet", "imagenet"),
        (None, TINY, None, [[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]),
        (None, TINY, "cifar10", "cifar10"),
        (None, "lenet5", None, "imagenet"),
    ],
)
def test_statistics_are_the_datas_or_the_weights(tmp_path, statistics, backbone, asked, resolved):
    data = ImageFolderDataModule(str(folder(tmp_path)), batch_size=4, val_fraction=0.4)
    data.statistics = statistics
    network = TransferClassifier(backbone, "none", num_classes=2, normalize=asked)
    trainer = quiet_trainer(max_steps=1, limit_val_batches=0)
    trainer.fit(network, data)
    trainer.save_checkpoint(tmp_path / "best.ckpt")
    assert read_checkpoint(tmp_path / "best.ckpt")["hyper_parameters"]["normalize"] == resolved
    again = TransferClassifier.load_from_checkpoint(tmp_path / "best.ckpt")
    assert torch.equal(again.mean, network.mean)
    assert again.mean.flatten().tolist() == pytest.approx(list(again.geometry.mean))
    assert again.geometry == replace(
        network.geometry, mean=again.geometry.mean, std=again.geometry.std
    )
