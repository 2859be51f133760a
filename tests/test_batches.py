"""Batches of a user's own loaders: taken in several forms, or refused in a sentence."""

import numpy as np
import pytest
import torch
from conftest import quiet_trainer
from lightning import LightningDataModule
from torch.utils.data import DataLoader, TensorDataset
from torchvision.datasets import FakeData

from cifar_transfer import (
    ArrayImages,
    BackboneFreeze,
    Classifier,
    ImageDataModule,
    ShapesDataModule,
    TransferClassifier,
)
from cifar_transfer.base.errors import UserError
from cifar_transfer.data.geometry import to_float


def model(**options):
    torch.manual_seed(0)
    return TransferClassifier("lenet5", "none", **{"num_classes": 2} | options)


def pixels(count=9):
    chance = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, 32, 32), generator=chance, dtype=torch.uint8)


FLOATS = pixels() / 255
LABELS = torch.arange(9) % 2


def loader(images=FLOATS, labels=LABELS, batch_size=3):
    return DataLoader(TensorDataset(images, labels), batch_size)


def dicts(images, labels):
    samples = [{images: image, labels: label} for image, label in zip(FLOATS, LABELS, strict=True)]
    return DataLoader(samples, 3)


def trained_weights(batches):
    network = model()
    quiet_trainer(max_epochs=1).fit(network, batches)
    return network.state_dict()


@pytest.mark.parametrize(
    "batches",
    [
        loader(pixels()),
        loader(pixels().short()),
        loader(labels=LABELS.int()),
        loader(labels=LABELS.to(torch.uint8)),
        dicts("pixel_values", "labels"),
        dicts("img", "label"),
    ],
    ids=["uint8", "int16", "int32 labels", "uint8 labels", "dicts", "dicts of CIFAR-10"],
)
def test_batches_in_other_forms_train_as_floats_do(batches):
    expected = trained_weights(loader())
    trained = trained_weights(batches)
    for name, value in expected.items():
        torch.testing.assert_close(trained[name], value, rtol=0, atol=1e-6, msg=name)


REFUSED = {
    "bytes as floats": (
        loader(pixels().float()),
        r"The images of \w+ reach from 0 to 255, and not from 0 to 1: divide them by 255",
    ),
    "normalised": (
        loader((FLOATS - 0.5) / 0.25),
        r"reach from -2 to 2, as if they were normalised, which the network does itself",
    ),
    "minus one to one": (loader(FLOATS * 2 - 1), "as if they were normalised"),
    "NaN": (loader(FLOATS * torch.nan), "images of training have pixels that are NaN"),
    "16 bits": (loader(pixels().int() * 257), "give integers from 0 to 255"),
    "channels last": (
        loader(FLOATS.permute(0, 2, 3, 1)),
        r"are float32 \[3, 32, 32, 3\]: give a tensor \[B, 3, H, W\]",
    ),
    "labels from one": (
        loader(labels=LABELS + 1),
        "labels from 1 to 2, but the network's 2 classes are numbered from 0 to 1",
    ),
    "negative labels": (loader(labels=LABELS - 1), "labels from -1 to 0"),
    "float labels": (loader(labels=LABELS.float()), r"labels of a batch are float32 \[3\]"),
    "one-hot labels": (loader(labels=torch.eye(9).long()), r"labels of a batch are int64 \[3, 9\]"),
    "no labels": (DataLoader(FLOATS, 3), "The batches of training have no labels: give pairs"),
    "other keys": (dicts("photo", "label"), "a dict with the keys photo, label: name its images"),
    "three parts": (
        DataLoader(TensorDataset(FLOATS, LABELS, LABELS), 3),
        "a list of 3: give pairs",
    ),
}


@pytest.mark.parametrize(("batches", "match"), REFUSED.values(), ids=REFUSED)
def test_batches_that_would_train_wrongly_are_refused(batches, match):
    network = model()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(UserError, match=match):
        quiet_trainer(max_epochs=1).fit(network, batches)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("run", ["validate", "test", "predict"])
def test_every_kind_of_step_looks_at_its_first_batch(run):
    with pytest.raises(UserError, match="divide them by 255"):
        getattr(quiet_trainer(), run)(model(), loader(pixels().float()))


def test_validation_is_looked_at_though_training_was_right():
    trainer = quiet_trainer(max_epochs=1, num_sanity_val_steps=0)
    with pytest.raises(UserError, match="The images of validation reach"):
        trainer.fit(model(), loader(), loader(pixels().float()))


def test_a_label_that_comes_late_is_refused():
    labels = LABELS.clone()
    labels[7] = 2
    with pytest.raises(UserError, match="labels from 0 to 2"):
        quiet_trainer(max_epochs=1).fit(model(), loader(labels=labels))


def test_a_little_overshoot_is_taken():
    quiet_trainer(max_epochs=1).fit(model(), loader(FLOATS * 1.2 - 0.1))


def test_our_own_loaders_may_be_iterated_by_hand():
    data = ShapesDataModule(train_images=20, test_images=8, eval_batch_size=4)
    data.setup()
    network = model(num_classes=10).eval()
    expected = torch.cat(quiet_trainer().predict(network, data))
    by_hand = []
    for batch in data.test_dataloader():
        by_hand.append(network(batch[0]).softmax(1))
        assert torch.equal(network.predict_step(batch, 0), by_hand[-1])
    torch.testing.assert_close(torch.cat(by_hand), expected)


def test_floats_of_a_loader_in_a_subclass_are_divided_only_once():
    class Floats(ShapesDataModule):
        def test_dataloader(self):
            return DataLoader(TensorDataset(FLOATS, LABELS), batch_size=3)

    data = Floats(train_images=20, test_images=8)
    network = model(num_classes=10)
    (first, *_) = quiet_trainer().predict(network, data)
    torch.testing.assert_close(first, network.eval()(FLOATS[:3]).softmax(1))


def test_booleans_are_black_and_white():
    assert to_float(torch.tensor([True, False])).tolist() == [1, 0]


@pytest.mark.parametrize("batches", [DataLoader(FLOATS, 3), loader(), dicts("image", "label")])
def test_predictions_need_no_labels(batches):
    probabilities = torch.cat(quiet_trainer().predict(model(), batches))
    expected = model().eval()(FLOATS).softmax(1)
    torch.testing.assert_close(probabilities, expected)


def test_a_data_module_predicts_its_test_images_in_order():
    data = ShapesDataModule(train_images=20, test_images=10, eval_batch_size=4)
    network = model(num_classes=10)
    batches = quiet_trainer().predict(network, data)
    assert [len(batch) for batch in batches] == [4, 4, 2]
    images, _ = data.images["test"].__getitems__(range(10))
    torch.testing.assert_close(torch.cat(batches), network.eval()(images).softmax(1))


def resnet():
    return TransferClassifier("resnet18", "none", num_classes=2)


@pytest.mark.parametrize("batch_size", [4, 1])
def test_a_last_batch_of_one_image_is_refused_before_training(batch_size):
    with pytest.raises(
        UserError, match=r"one image, on which batch-norm cannot train: .*drop_last"
    ):
        quiet_trainer(max_epochs=1).fit(resnet(), loader(batch_size=batch_size))


def test_a_single_image_is_taken_where_it_does_no_harm():
    quiet_trainer(max_epochs=1).fit(model(), loader(batch_size=4))  # without batch-norm
    quiet_trainer(max_epochs=1, limit_train_batches=1).fit(resnet(), loader(batch_size=4))


class Photos(ImageDataModule):
    class_names = ("apple", "pear")

    def load(self, split):
        return None if split == "val" else ArrayImages(pixels(12).numpy(), np.arange(12) % 2)


def test_a_data_set_of_torchvision_is_refused_with_a_way_out():
    class Other(Photos):
        def load(self, split):
            return FakeData(6)

    with pytest.raises(UserError, match=r"Other.load gives a FakeData, .* to DatasetDataModule"):
        Other().setup()


def test_class_names_that_are_left_out_are_those_of_the_data(tmp_path):
    network = model()
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(network, Photos(batch_size=4))
    trainer.save_checkpoint(tmp_path / "m.ckpt")
    assert Classifier.load(tmp_path / "m.ckpt").class_names == ["apple", "pear"]

    class Fruit(Photos):
        class_names = ("plum", "fig")

    with pytest.raises(UserError, match="class"):
        quiet_trainer().test(network, Fruit())
    quiet_trainer(max_epochs=1).fit(network, Fruit(batch_size=4))
    assert network.classifier.class_names == ["plum", "fig"]


@pytest.mark.parametrize("between", ["validate", "test", "predict"])
def test_a_fit_may_follow_an_evaluation(between):
    network = model()
    data = Photos(batch_size=4)
    quiet_trainer(max_epochs=1).fit(network, data)
    getattr(quiet_trainer(), between)(network, data)
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(network, data)
    again = quiet_trainer().validate(network, data, verbose=False)
    assert again[0]["val/loss"] == pytest.approx(float(trainer.callback_metrics["val/loss"]))


def test_a_validation_returns_its_figures_and_prints_them(capsys):
    trainer = quiet_trainer()
    (scores,) = trainer.validate(model(), Photos())
    assert scores == {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert scores.keys() >= {"val/loss", "val/acc"}
    assert "val/acc" in capsys.readouterr().out


def test_a_data_module_of_others_may_give_dicts():
    class Others(LightningDataModule):
        def train_dataloader(self):
            return dicts("image", "label")

        val_dataloader = train_dataloader

    freeze = BackboneFreeze(unfreeze_epoch=1)
    quiet_trainer(max_epochs=1, callbacks=[freeze]).fit(model(), Others())
