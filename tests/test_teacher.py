"""A network that another one teaches: its loss, and what is refused. Nothing of it is kept."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, assert_same_weights, quiet_trainer, run_fit
from lightning import seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from cifar_transfer import BackboneFreeze, Classifier, ShapesDataModule, TransferClassifier
from cifar_transfer.base.errors import UserError
from cifar_transfer.training.checkpoint_file import load_classifier
from cifar_transfer.training.resume import refuse_changes

NETWORK = "shufflenet_v2_x0_5"
NAMES = ShapesDataModule(train_images=100).class_names
ALIKE = {"normalize": "cifar10", "optimizer": "sgd", "class_names": NAMES}


def write_teacher(path, size=(32, 32), **options):
    """The checkpoint of a network that has learned nothing but has opinions."""
    seed_everything(7)
    model = TransferClassifier(**{"backbone": NETWORK, "weights": "none"} | ALIKE | options)
    for name, value in model.network.state_dict().items():
        if name.endswith("running_mean"):
            value.normal_(0, 0.1)
    with torch.no_grad():
        model.network.get_submodule(model.heads[0]).weight.mul_(20)
    geometry = model.classifier.geometry
    model.classifier.set_geometry(replace(geometry, size=size))
    checkpoint = {
        "state_dict": model.state_dict(),
        "hyper_parameters": dict(model.hparams),
        "global_step": 0,
    }
    model.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, path)
    return str(path)


@pytest.fixture
def teacher(tmp_path):
    """One that takes images of 48 pixels, and its own statistics."""
    return write_teacher(tmp_path / "teacher.ckpt", image_size=48, normalize="imagenet")


class Witness(Callback):
    """Keeps the first step: batch, weights before it, loss and gradients."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 0:
            self.batch = batch
            self.before = {name: value.clone() for name, value in module.state_dict().items()}

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.gradients = [p.grad.clone() for p in module.parameters() if p.grad is not None]
        self.optimized = [p for group in optimizer.param_groups for p in group["params"]]

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx == 0:
            self.loss = float(outputs["loss"])


def fit(folder, callbacks=(), weights=None, trainer=None, ckpt_path=None, **options):
    seed_everything(0)
    data = ShapesDataModule(train_images=160, test_images=40, batch_size=16, class_weights=weights)
    model = TransferClassifier(**{"backbone": NETWORK, "weights": "none"} | ALIKE | options)
    made = quiet_trainer(
        **{"max_epochs": 1, "limit_train_batches": 2, "num_sanity_val_steps": 0} | (trainer or {}),
        default_root_dir=folder,
        callbacks=list(callbacks),
    )
    made.fit(model, data, ckpt_path=ckpt_path)
    return model, made


def formula(images, logits, labels, teacher, share, temperature, weights, smoothing):
    """By NumPy, image by image."""

    def softmax(values):
        shares = np.exp(values - values.max())
        return shares / shares.sum()

    with torch.no_grad():
        told = load_classifier(teacher)(images).double().numpy()
    losses = []
    for own, theirs, label in zip(
        logits.detach().double().numpy(), told, labels.tolist(), strict=True
    ):
        wanted = np.full(len(own), smoothing / len(own))
        wanted[label] += 1 - smoothing
        entropy = -(wanted * np.log(softmax(own))).sum() * weights[label]
        p, q = softmax(theirs / temperature), softmax(own / temperature)
        losses.append((1 - share) * entropy + share * temperature**2 * (p * np.log(p / q)).sum())
    return np.mean(losses)


def test_the_loss_is_that_of_the_paper_and_nothing_of_the_teacher_is_kept(tmp_path, teacher):
    """Class weights only weigh the cross-entropy. The student sees other sizes and statistics."""
    witness = Witness()
    options = {
        "teacher": teacher,
        "teacher_weight": 0.3,
        "temperature": 2.5,
        "label_smoothing": 0.1,
        "image_size": 40,
    }
    weights = np.linspace(1, 3, len(NAMES))
    model, trainer = fit(tmp_path, [witness], weights=weights.tolist(), ema=0.9, **options)
    plain = TransferClassifier(NETWORK, "none", image_size=40, **ALIKE)
    plain.load_state_dict(witness.before)
    images, labels = witness.batch
    counts = np.bincount(trainer.datamodule.images["train"].labels, minlength=len(NAMES))
    weights *= counts.sum() / (weights @ counts)
    assert witness.loss == pytest.approx(
        formula(images, plain(images), labels, teacher, 0.3, 2.5, weights, 0.1), 1e-5
    )

    file = torch.load(teacher, weights_only=True)["state_dict"]
    now = {
        f"classifier.network.{name}": value
        for name, value in model.loss.teacher.classifier.network.state_dict().items()
    }
    assert [name for name, value in now.items() if not torch.equal(value, file[name])] == [], (
        "nor its batch-norm learns"
    )
    assert len(witness.optimized) == len([*plain.parameters()]) == len([*model.parameters()])
    path = tmp_path / "student.ckpt"
    trainer.save_checkpoint(path)
    assert torch.load(path, weights_only=True)["state_dict"].keys() == plain.state_dict().keys()
    Path(teacher).unlink()
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert len(Classifier.load(path).predict(pixels, 3)) == 3
    assert TransferClassifier.load_from_checkpoint(path).hparams["teacher"] == teacher
    quiet_trainer(default_root_dir=tmp_path).test(
        TransferClassifier.load_from_checkpoint(path), trainer.datamodule
    )


def test_a_student_that_is_its_teacher_has_nothing_to_learn(tmp_path):
    teacher, witness = write_teacher(tmp_path / "teacher.ckpt"), Witness()
    frozen = BackboneFreeze(1)  # whose batch-norm rests, as the teacher's
    _, trainer = fit(tmp_path, [witness, frozen], teacher=teacher, teacher_weight=1.0)
    assert witness.loss > 0.1, "another network has"
    seed_everything(0)
    model = TransferClassifier(NETWORK, teacher, teacher=teacher, teacher_weight=1.0, **ALIKE)
    frozen, witness = BackboneFreeze(1), Witness()
    options = {
        "max_epochs": 1,
        "limit_train_batches": 1,
        "num_sanity_val_steps": 0,
        "default_root_dir": tmp_path,
    }
    quiet_trainer(**options, callbacks=[frozen, witness]).fit(model, trainer.datamodule)
    assert witness.loss == pytest.approx(0, abs=1e-6)
    assert len(witness.gradients) == 2, "of the head"
    assert max(float(gradient.abs().max()) for gradient in witness.gradients) < 1e-6


def test_with_no_weight_it_is_as_if_there_were_no_teacher(tmp_path, teacher):
    half = {"precision": "bf16-mixed", "accumulate_grad_batches": 2, "limit_train_batches": 3}
    (taught, _), (alone, _), (other, _) = (
        fit(tmp_path, trainer=half, **options)
        for options in ({"teacher": teacher, "teacher_weight": 0.0}, {}, {"teacher": teacher})
    )
    states = [model.state_dict() for model in (taught, alone, other)]
    assert [name for name in states[0] if not torch.equal(states[0][name], states[1][name])] == []
    assert not torch.equal(
        states[1]["classifier.network.conv1.0.weight"],
        states[2]["classifier.network.conv1.0.weight"],
    ), "it is heard"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher_weight": 1.5}, r"teacher_weight is 1\.5: take a share in \[0, 1\]"),
        ({"temperature": 0.0}, r"temperature is 0\.0: take 0\.01 to 1000"),
        ({"teacher": "gone.ckpt"}, r"teacher=gone\.ckpt: The checkpoint gone\.ckpt does not exist"),
        ({"teacher": __file__}, r"teacher=.*test_teacher\.py cannot be read as a checkpoint"),
        ({"teacher": {"class_names": NAMES[::-1]}}, "teacher=.*their classes in another order"),
        (
            {"teacher": {"class_names": None, "num_classes": 3}},
            "teacher=.*It has 3 outputs, and its student 10",
        ),
        (
            {"teacher": {"size": (40, 48)}},
            "decoded to 48 x 40 pixels, and the data give 32 x 32: give both the same",
        ),
    ],
)
def test_mistakes_get_a_sentence(tmp_path, options, message):
    if isinstance(made := options.get("teacher"), dict):
        options = {"teacher": write_teacher(tmp_path / "teacher.ckpt", **made)}
    with pytest.raises(UserError, match=message) as error:
        fit(tmp_path, **options)
    assert "\n" not in str(error.value)


@pytest.mark.whole
def test_a_resumed_run_ends_as_one_that_was_not_stopped_and_needs_the_teacher(tmp_path, teacher):
    job = [
        *TINY,
        f"--model.teacher={teacher}",
        "--freeze.unfreeze_epoch=1",
        "--trainer.max_epochs=2",
    ]
    run_fit(tmp_path, *job)
    run_fit(tmp_path, *job, "--trainer.max_steps=8")  # within the second epoch
    runs = [tmp_path / "lightning_logs" / f"version_{number}" for number in (0, 1)]
    moved = Path(teacher).rename(tmp_path / "moved.ckpt")
    resumed = f"--resume={runs[1]}", "--trainer.max_steps=-1"
    done = run_fit(tmp_path, *resumed, expect=2)
    assert (
        f"error: --model.teacher={teacher}: The checkpoint {teacher} does not exist" in done.stderr
    )
    moved.rename(teacher)
    run_fit(tmp_path, *resumed)
    assert_same_weights(*(run / "checkpoints" / "last.ckpt" for run in runs))


def test_another_file_in_the_place_of_the_teacher_is_refused_on_resuming(tmp_path):
    path = tmp_path / "teacher.ckpt"
    write_teacher(path)
    last = ModelCheckpoint(tmp_path, save_last=True)
    fit(tmp_path, [last], teacher=str(path))
    again = {"max_epochs": 2}
    fit(tmp_path, trainer=again, teacher=str(path), ckpt_path=last.last_model_path)
    write_teacher(path, normalize="imagenet")
    with pytest.raises(
        UserError, match=r"teacher=.*teacher.ckpt is another file than the one with"
    ):
        fit(tmp_path, trainer=again, teacher=str(path), ckpt_path=last.last_model_path)


def test_another_teacher_on_resuming_is_refused():
    before = {"model.teacher": "a.ckpt", "model.temperature": 4.0, "model.teacher_weight": 0.5}
    for name, value in (("teacher", None), ("temperature", 2.0), ("teacher_weight", 0.6)):
        with pytest.raises(UserError, match=f"model.{name}=.* differs from"):
            refuse_changes(before, before | {f"model.{name}": value})
