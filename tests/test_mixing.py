"""Mixup and CutMix: torchvision's images and labels, their loss, and the epochs without them."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import RUN, TINY, assert_same_weights, quiet_trainer, run_fit
from lightning import seed_everything
from lightning.pytorch import Callback
from torch import nn
from torchvision.transforms import v2

from cifar_transfer import ShapesDataModule, TransferClassifier
from cifar_transfer.base.errors import UserError
from cifar_transfer.results.run_figures import augmented_figure
from cifar_transfer.training.loss import LossOptions, TrainingLoss
from cifar_transfer.training.mixing import BatchMixing, MixingOptions, count_epochs
from cifar_transfer.training.report import augmented_images

CLASSES = 5
IMAGES = torch.rand(6, 3, 16, 24, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 4, 2, 2, 1, 3])
BOTH = {"mixup_alpha": 0.4, "cutmix_alpha": 1.0}


def mixing(**options):
    return BatchMixing(MixingOptions(**options), CLASSES)


def lenet(**options):
    return TransferClassifier("lenet5", "none", num_classes=10, **options)


def shapes(**options):
    return ShapesDataModule(train_images=100, test_images=20, batch_size=16, **options)


@pytest.mark.parametrize(
    ("options", "transform"),
    [
        ({"mixup_alpha": 0.4}, v2.MixUp(alpha=0.4, num_classes=CLASSES)),
        ({"cutmix_alpha": 1}, v2.CutMix(alpha=1.0, num_classes=CLASSES)),
    ],
)
def test_images_and_labels_are_torchvisions_and_bytes_are_taken_too(options, transform):
    pixels = (255 * IMAGES).byte()
    for seed in range(5):
        torch.manual_seed(seed)
        images, shares = mixing(**options)(pixels, LABELS)
        torch.manual_seed(seed)
        expected_images, expected_shares = transform(pixels / 255, LABELS)
        torch.testing.assert_close(images, expected_images)
        assert torch.equal(shares, expected_shares)
        torch.testing.assert_close(shares.sum(1), torch.ones(6))


def test_of_both_one_is_drawn_for_each_batch():
    mix = mixing(**BOTH)
    torch.manual_seed(0)
    cut = 0
    for _ in range(200):
        images, _ = mix(IMAGES, LABELS)
        # Each pixel of CutMix is one of either image.
        copied = (images == IMAGES) | (images == IMAGES.roll(1, 0))
        cut += int(copied.all())
    assert 75 < cut < 125, "half of them, by four standard deviations"


def mixed_loss(logits, share, smoothing, weights):
    """By NumPy: the losses of an image's two labels, each with its share."""
    log_shares = logits.double().log_softmax(1).numpy()

    def loss(label, row):
        wanted = np.full(CLASSES, smoothing / CLASSES)
        wanted[label] += 1 - smoothing
        return -(wanted * row).sum() * weights[label]

    losses = []
    for first, second, row in zip(LABELS, LABELS.roll(1), log_shares, strict=True):
        losses.append(share * loss(first, row) + (1 - share) * loss(second, row))
    return np.mean(losses)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", [None, [0.5, 1.0, 2.0, 1.5, 3.0]])
def test_the_loss_is_that_of_both_labels(weights, smoothing, dtype):
    logits = torch.randn(6, CLASSES, generator=torch.Generator().manual_seed(1)).to(dtype)
    torch.manual_seed(2)
    _, shares = mixing(mixup_alpha=1.0)(IMAGES, LABELS)
    share = float(shares[0, LABELS[0]])
    assert 0.1 < share < 0.9
    class_weights = None if weights is None else torch.tensor(weights)
    loss = TrainingLoss(LossOptions(label_smoothing=smoothing), class_weights)
    expected = mixed_loss(logits, share, smoothing, weights or np.ones(CLASSES))
    value = float(loss(IMAGES, logits, shares))
    assert value == pytest.approx(expected, rel=1e-2 if dtype == torch.bfloat16 else 1e-5)
    if weights is None:
        criterion = nn.CrossEntropyLoss(label_smoothing=smoothing)
        assert value == float(criterion(logits, shares)), "as torchvision's reference computes it"


class Witness(Callback):
    """Keeps the batch, the loss and the state of chance of the first step, and what is active."""

    def __init__(self):
        self.active = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == 0:
            self.batch = batch
            self.chance = torch.get_rng_state()
            self.before = {name: value.clone() for name, value in module.state_dict().items()}

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx == 0:
            self.active.append(module.mixing.is_active)
        if trainer.global_step == 1:
            self.loss = float(outputs["loss"])
            self.correct = int(module.train_acc.tp.sum())


def test_a_step_trains_on_the_mixed_batch_and_counts_the_larger_share():
    seed_everything(1)
    witness = Witness()
    model = lenet(mixup_alpha=1.0, label_smoothing=0.1)
    for parameter in model.network.parameters():
        nn.init.normal_(parameter, 0, 0.3)  # a network of many opinions
    data = shapes(class_weights=[1.0, 2.0] * 5, seed=2)
    trainer = quiet_trainer(max_steps=1, num_sanity_val_steps=0, callbacks=[witness])
    trainer.fit(model, data)
    images, labels = witness.batch
    assert labels.dtype == torch.int64, "callbacks see whole labels"
    torch.set_rng_state(witness.chance)
    images, shares = v2.MixUp(alpha=1.0, num_classes=10)(images, labels)
    assert (shares.argmax(1) != labels).any()
    plain = lenet(normalize="cifar10")
    plain.load_state_dict(witness.before)
    logits = plain.train()(images)
    loss = model.loss(images, logits, shares)
    assert witness.loss == pytest.approx(loss.item(), rel=1e-5)
    correct = int((logits.argmax(1) == shares.argmax(1)).sum())
    assert witness.correct == correct != int((logits.argmax(1) == labels).sum())


def test_the_last_epochs_are_not_mixed_and_the_table_says_so(capsys):
    witness = Witness()
    model = lenet(**BOTH, mix_off_epochs=2)
    trainer = quiet_trainer(max_epochs=4, limit_train_batches=1, callbacks=[witness])
    trainer.fit(model, shapes())
    assert witness.active == [True, True, False, False]
    assert capsys.readouterr().out.splitlines() == [
        "Epochs 1 to 2: images are mixed; train acc counts the larger share's label.",
        "Epochs 3 to 4: images are not mixed.",
    ]


@pytest.mark.parametrize(
    ("trainer", "batches", "epochs"),
    [
        ({"max_epochs": 5, "max_steps": -1}, 10, 5),
        ({"max_epochs": 5, "max_steps": 21}, 10, 3),
        ({"max_epochs": 5, "max_steps": 21, "accumulate_grad_batches": 3}, 10, 5),
        ({"max_epochs": 5, "max_steps": 100}, 10, 5),
        ({"max_epochs": -1, "max_steps": 21}, 10, 3),
        ({"max_epochs": -1, "max_steps": 21}, float("inf"), None),
        ({"max_epochs": -1, "max_steps": -1}, 10, None),
    ],
)
def test_the_epochs_of_a_run_are_counted_where_they_are_known(trainer, batches, epochs):
    loop = SimpleNamespace(setup_data=lambda: None)
    options = {"num_training_batches": batches, "fit_loop": loop, "accumulate_grad_batches": 1}
    assert count_epochs(SimpleNamespace(**options | trainer)) == epochs


def test_a_run_without_an_end_has_no_last_epochs():
    with pytest.raises(UserError, match=r"mix_off_epochs=2 counts back from the end of the run"):
        quiet_trainer(max_epochs=-1).fit(lenet(mixup_alpha=1.0, mix_off_epochs=2), shapes())


def test_a_run_that_ends_before_it_mixes_says_so(recwarn):
    trainer = quiet_trainer(max_epochs=1, limit_train_batches=1)
    witness = Witness()
    trainer.callbacks.append(witness)
    trainer.fit(lenet(mixup_alpha=1.0, mix_off_epochs=3), shapes())
    assert witness.active == [False]
    warnings = [str(warning.message) for warning in recwarn]
    assert any("No image is mixed, because the run has 1 epochs" in text for text in warnings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixup_alpha": -1.0}, r"mixup_alpha is -1\.0: take 0 \(off\), or 0\.001 to 1000"),
        ({"mixup_alpha": None}, "mixup_alpha is null"),
        ({"cutmix_alpha": float("nan")}, "cutmix_alpha is nan"),
        ({"cutmix_alpha": [1.0]}, "cutmix_alpha is"),
        ({"mix_off_epochs": 0.5}, r"mix_off_epochs is 0\.5: take 0 epochs or more"),
    ],
)
def test_mistakes_get_a_sentence(options, message):
    with pytest.raises(UserError, match=message):
        TransferClassifier("lenet5", "none", **options)


def test_only_training_images_are_mixed(monkeypatch):
    monkeypatch.setattr(BatchMixing, "__call__", lambda *batch: pytest.fail("it is mixed"))
    model = lenet(**BOTH)
    trainer = quiet_trainer()
    trainer.validate(model, shapes(), verbose=False)
    trainer.test(model, shapes(), verbose=False)
    trainer.predict(model, shapes())


def test_the_picture_shows_mixed_images_with_the_shares_of_their_labels():
    data = shapes()
    data.setup()
    mix = BatchMixing(MixingOptions(mixup_alpha=1.0), data.num_classes)
    random_state = torch.get_rng_state()
    plain, labels = augmented_images(data, 32)
    images, shares = augmented_images(data, 32, mix)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert set(labels.max(1)) == {1.0}
    group = slice(8, 16)  # mixed with each other
    share = shares[group].min(1, where=shares[group] > 0, initial=1)[0]
    mixtures = []
    for weight in (share, 1 - share):
        mixtures.append(weight * plain[group] + (1 - weight) * np.roll(plain[group], 1, 0))
    distances = [np.abs(mixture - images[group]).max() for mixture in mixtures]
    assert min(distances) <= 1
    titles = [axes.get_title() for axes in augmented_figure(images, shares, data.class_names).axes]
    first = np.argsort(-shares[0])[:2]
    expected = [f"{data.class_names[label]} {shares[0][label]:.0%}" for label in first]
    assert titles[0].split("\n") == expected


@pytest.mark.slow
def test_a_run_stopped_within_an_epoch_ends_as_one_that_was_not(tmp_path):
    job = [
        *TINY,
        "--model.backbone=lenet5",
        "--model.mixup_alpha=0.4",
        "--model.cutmix_alpha=1",
        "--model.mix_off_epochs=1",
        "--model.ema=0.9",
        "--freeze.unfreeze_epoch=1",
        "--trainer.max_epochs=3",
    ]
    for folder in ("whole", "stopped"):
        (tmp_path / folder).mkdir()
    run_fit(tmp_path / "whole", *job)
    run_fit(tmp_path / "stopped", "Ctrl-C", 9, *job, module="killed_job", expect=130)
    done = run_fit(tmp_path / "stopped", f"--resume={RUN}")
    assert "Epoch 2: images are mixed" in done.stdout
    assert "Epoch 3: images are not mixed" in done.stdout
    last = Path(RUN, "checkpoints", "last.ckpt")
    assert_same_weights(tmp_path / "whole" / last, tmp_path / "stopped" / last)


@pytest.mark.whole
def test_two_processes_resumed_after_an_epoch_end_as_two_that_were_not(tmp_path):
    """What each of them draws follows from the step, not from the epochs before."""
    job = [
        *TINY,
        "--model.backbone=lenet5",
        "--model.mixup_alpha=0.4",
        "--model.cutmix_alpha=1",
        "--freeze.unfreeze_epoch=1",
        "--trainer.devices=2",
    ]
    for folder in ("whole", "resumed"):
        (tmp_path / folder).mkdir()
    run_fit(tmp_path / "whole", *job, "--trainer.max_epochs=3")
    run_fit(tmp_path / "resumed", *job, "--trainer.max_epochs=1")
    done = run_fit(tmp_path / "resumed", f"--resume={RUN}", "--trainer.max_epochs=3")
    assert "Epochs 2 to 3: images are mixed" in done.stdout
    last = Path(RUN, "checkpoints", "last.ckpt")
    assert_same_weights(tmp_path / "whole" / last, tmp_path / "resumed" / last)


def test_without_it_nothing_is_drawn():
    """The default recipes stay as they are, to the last bit."""
    states = []
    for options in ({}, {"mix_off_epochs": 1}):
        seed_everything(0)
        model = lenet(**options)
        assert model.mixing is None
        quiet_trainer(max_steps=2).fit(model, shapes())
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
