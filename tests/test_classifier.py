"""The network's input, and what the module refuses."""

import numpy as np
import pytest
import torch
from conftest import quiet_trainer
from lightning import seed_everything
from lightning.pytorch.callbacks import ModelPruning
from PIL import Image
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.data import DataLoader, TensorDataset

from cifar_transfer import Classifier, ShapesDataModule, TransferClassifier
from cifar_transfer.base.errors import UserError
from cifar_transfer.data.geometry import STATISTICS
from cifar_transfer.training.checkpoint_file import load_classifier
from cifar_transfer.training.evaluation import MirroredAccuracy

TINY = "shufflenet_v2_x0_5"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "resnet81"}, "resnet18"),
        ({"weights": "IMAGENET1K_V9"}, "IMAGENET1K_V1"),
        ({"weights": "gone/w.pth"}, "neither a file"),
        ({"num_classes": 3, "class_names": ["a", "b"]}, "the data have 2 classes"),
        ({"normalize": "imagnet"}, "imagenet"),
        ({"normalize": [[0.5, 0.5], [0.2, 0.2]]}, "two triples"),
        ({"normalize": [[0.5] * 3, [0.2, 0.0, 0.2]]}, "two triples"),
        ({"lr": 0.0}, "lr is 0"),
        ({"lr_factor": 1.0}, "lr_factor"),
        ({"image_size": 0}, "image_size"),
        ({"train_sizes": []}, "train_sizes"),
        ({"train_sizes": [32, 0]}, "train_sizes"),
    ],
)
def test_mistakes_get_a_sentence(options, message):
    with pytest.raises(UserError, match=message) as error:
        TransferClassifier(**{"backbone": TINY, "weights": "none"} | options)
    assert "\n" not in str(error.value)


def test_input_is_resized_and_normalised():
    class Recorder(nn.Module):
        def forward(self, images):
            self.seen = images
            return images.new_zeros(len(images), 10)

    images = torch.rand(2, 3, 32, 32)
    for normalize in ("cifar10", "imagenet", [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]):
        model = TransferClassifier(TINY, "none", image_size=48, normalize=normalize)
        model.classifier.network = Recorder()
        model(images)
        mean, std = (
            STATISTICS.get(normalize, normalize) if isinstance(normalize, str) else normalize
        )
        resized = nn.functional.interpolate(images, size=(48, 48), mode="bilinear", antialias=True)
        for channel in range(3):
            expected = (resized[:, channel] - mean[channel]) / std[channel]
            torch.testing.assert_close(model.network.seen[:, channel], expected)


def fit(folder, epochs=1, **options):
    seed_everything(0)
    data = ShapesDataModule(train_images=160, test_images=40, val_fraction=0.25, batch_size=30)
    module = TransferClassifier(
        **{"backbone": TINY, "weights": "none"} | options, class_names=data.class_names
    )
    seen = []
    module.network.register_forward_pre_hook(
        lambda net, inputs: seen.append((net.training, inputs[0].shape[-1]))
    )
    trainer = quiet_trainer(
        max_epochs=epochs,
        num_sanity_val_steps=0,
        default_root_dir=folder,
    )
    trainer.fit(module, data)
    return module, seen, trainer


def test_training_sizes_share_the_steps_and_evaluation_has_its_own(tmp_path):
    _, seen, _ = fit(tmp_path, epochs=2, train_sizes=[24, 32], image_size=40)
    assert [size for training, size in seen if training] == [24] * 4 + [32] * 4
    assert {size for training, size in seen[3:] if not training} == {40}


def test_without_image_size_the_last_of_the_training_sizes_is_that_of_the_evaluation(tmp_path):
    module, seen, trainer = fit(tmp_path, epochs=2, train_sizes=[24, 48])
    assert [size for training, size in seen if training] == [24] * 4 + [48] * 4
    assert {size for training, size in seen[3:] if not training} == {48}
    del seen[:]
    trainer.test(module, ShapesDataModule(train_images=160, test_images=40), verbose=False)
    trainer.save_checkpoint(tmp_path / "m.ckpt")
    image = np.zeros((32, 32, 3), np.uint8)
    Classifier.load(tmp_path / "m.ckpt").predict([Image.fromarray(image)])
    assert {size for _, size in seen[2:]} == {48}  # after the check of both sizes
    assert load_classifier(tmp_path / "m.ckpt").geometry.input_side == 48


def test_sizes_that_the_network_cannot_take_are_refused_before_training(tmp_path):
    data = ShapesDataModule(train_images=160, test_images=40)
    module = TransferClassifier(
        "vit_b_16", "none", class_names=data.class_names, image_size=32, train_sizes=[16, 32]
    )
    with pytest.raises(UserError, match="cannot take images of 16 pixels"):
        quiet_trainer(default_root_dir=tmp_path, max_epochs=1).fit(module, data)


def test_pruning_and_vectors_of_the_parameters_need_them_contiguous(tmp_path):
    module = TransferClassifier("lenet5", "none", num_classes=10)
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        parameters_to_vector(module.parameters())
    module.to(memory_format=torch.contiguous_format)  # as the documents say
    vector = parameters_to_vector(module.parameters())
    vector_to_parameters(vector, module.parameters())
    assert len(vector) == sum(parameter.numel() for parameter in module.parameters())
    convolutions = [layer for layer in module.modules() if isinstance(layer, nn.Conv2d)]
    layers = [(layer, "weight") for layer in convolutions]
    pruning = ModelPruning(
        "l1_unstructured", layers, amount=0.5, use_lottery_ticket_hypothesis=False
    )
    data = ShapesDataModule(train_images=40, test_images=10)
    quiet_trainer(max_epochs=1, callbacks=[pruning], default_root_dir=tmp_path).fit(module, data)
    weights = torch.cat([layer.weight.flatten() for layer in convolutions])
    assert float((weights == 0).float().mean()) == pytest.approx(0.5, abs=0.01)


def test_images_reach_the_network_channels_last():
    module = TransferClassifier("lenet5", "none", num_classes=10)
    formats = []
    module.network.register_forward_pre_hook(
        lambda _, inputs: formats.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
    )
    module(torch.rand(2, 3, 32, 32))
    assert formats == [True]


@pytest.mark.slow
def test_compiled_networks_keep_their_names_and_their_results(tmp_path, monkeypatch):
    compile = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda module: compile(module, backend="eager")
    )  # inductor takes minutes
    plain, _, _ = fit(tmp_path, backbone="lenet5")
    compiled, _, trainer = fit(tmp_path, backbone="lenet5", compile=True)
    assert compiled.network._compiled_call_impl is not None
    trainer.save_checkpoint(tmp_path / "compiled.ckpt")
    state = torch.load(tmp_path / "compiled.ckpt", weights_only=True)["state_dict"]
    assert state.keys() == plain.state_dict().keys()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-3, atol=1e-3)


def test_mirrored_accuracy_is_of_an_image_and_its_mirror_image_together():
    class LeftOrRight(nn.Module):
        """Class 1, strongly, where the left half is bright; class 0, weakly, elsewhere."""

        def forward(self, images):
            left = images[..., :16].mean((1, 2, 3)) > images[..., 16:].mean((1, 2, 3))
            return torch.where(left[:, None], torch.tensor([0.0, 5.0]), torch.tensor([1.0, 0.0]))

    model = TransferClassifier("lenet5", "none", num_classes=2).eval()
    model.classifier.network = LeftOrRight()
    images = torch.zeros(4, 3, 32, 32)
    images[:2, ..., :16] = 1
    images[2:, ..., 16:] = 1
    labels = torch.ones(4, dtype=torch.int64)
    loader = DataLoader(TensorDataset(images, labels), batch_size=3)
    trainer = quiet_trainer(callbacks=[MirroredAccuracy(2)])
    trainer.validate(model, loader, verbose=False)
    assert float(trainer.callback_metrics["val/acc"]) == 0.5
    assert float(trainer.callback_metrics["val/mirrored_acc"]) == 1.0
    trainer.test(model, loader, verbose=False)
    assert float(trainer.callback_metrics["test/mirrored_acc"]) == 1.0


@pytest.mark.parametrize(
    ("name", "value", "stored"),
    [
        ("class_names", np.unique(["dog", "cat"]), ["cat", "dog"]),
        ("class_names", list(np.unique(["dog", "cat"])), ["cat", "dog"]),
        ("num_classes", np.int64(3), 3),
        ("image_size", np.int64(48), 48),
        ("train_sizes", np.array([24, 32]), [24, 32]),
        ("normalize", np.full((2, 3), 0.5), [[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]),
        ("label_smoothing", np.float32(0.5), 0.5),
        ("lr", np.logspace(-4, -2, 3)[1], 1e-3),
        ("lr", torch.tensor(0.5), 0.5),
        ("ema", np.float64(0.5), 0.5),
    ],
    ids=repr,
)
def test_options_are_stored_as_primitives(tmp_path, name, value, stored):
    model = TransferClassifier(**{"backbone": "lenet5", "weights": "none", name: value})
    trainer = quiet_trainer()
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "w.ckpt")
    options = torch.load(tmp_path / "w.ckpt", weights_only=True)["hyper_parameters"]
    assert options[name] == stored
    again = TransferClassifier.load_from_checkpoint(tmp_path / "w.ckpt")
    assert again.hparams[name] == stored


def test_an_option_that_cannot_be_stored_is_refused():
    with pytest.raises(UserError, match=r"^teacher is builtins.object"):
        TransferClassifier("lenet5", "none", teacher=object())
