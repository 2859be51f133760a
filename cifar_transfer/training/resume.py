"""What a run that continues may change: one table, for `--resume`, `--ckpt_path` and `Trainer.fit(ckpt_path=...)`."""

from collections.abc import Mapping
from typing import Any

from lightning import LightningDataModule, Trainer

from cifar_transfer.base.errors import UserError
from cifar_transfer.data.module import EarlierRun, ImageDataModule
from cifar_transfer.data.splits import digest
from cifar_transfer.network.image_classifier import NetworkDescription

_UNDONE = "would be undone by the checkpoint"
_SPLIT = "would make validation images of images that were trained on"
_SKIPPED = "would skip images of the epoch that the checkpoint is in, or repeat them"
_AVERAGE = "would score other weights than the run has so far"
_LOSS = "the training loss is another one"
_UNFROZEN = "would have no effect, because parameters are unfrozen already"
REFUSED = {
    **{
        f"model.{name}": _UNDONE
        for name in ("backbone", "num_classes", "small_images", "patch_size")
    },
    **{
        f"model.{name}": _UNDONE
        for name in ("optimizer", "lr", "head_lr", "layer_decay", "weight_decay", "momentum")
    },
    **{f"model.{name}": _UNDONE for name in ("schedule", "lr_factor", "lr_patience")},
    "model.ema": _AVERAGE,
    **{f"data.{name}": _SPLIT for name in ("data", "seed", "val_fraction", "task", "train_images")},
}
_ORDER = ("data.batch_size", "data.sampler", "data.left_out", "processes", "training_images")
REFUSED_WITHIN_AN_EPOCH = {name: _SKIPPED for name in _ORDER}
MENDS = {
    "data.left_out": "have the list as it was",
    "training_images": "have the images as they were",
}
FREEZE = (
    "unfreeze_epoch",
    "unfrozen_lr",
    "frozen",
    "batch_norm",
    "phases",
    "probe",
    "monitor",
    "mode",
)
REFUSED_UNFROZEN = {f"freeze.{name}": _UNFROZEN for name in FREEZE}
CHANGED = {
    "model.image_size": "the network sees images of another size",
    "model.train_sizes": "the sizes are shared out over the run anew",
    "model.normalize": "the network sees images with other statistics",
    **{
        f"model.{name}": _LOSS
        for name in ("label_smoothing", "teacher", "teacher_weight", "temperature")
    },
    "model.warmup_epochs": "the learning rate follows another curve",
    "data.batch_size": "an epoch has another number of steps",
    "data.class_weights": _LOSS,
    "data.sampler": "an epoch draws other images",
    "data.left_out": "the images are others",
    "data.augment": "training images are augmented in another way",
    "data.root": "the images are read from there",
    "data.decode_size": "the images are decoded at another size",
    "data.test_images": "the test is another one",
    "freeze.unfreeze_epoch": "the backbone stays frozen for that many epochs",
    "freeze.unfrozen_lr": "this is the rate after the unfreezing",
    "freeze.frozen": "other parameters are frozen until the unfreezing",
    "freeze.batch_norm": "frozen modules are in that mode until the unfreezing",
    "freeze.phases": "phases that have not begun follow the new plan",
    "freeze.probe": "the head is what it has become",
    "freeze.monitor": "the next phase waits for that figure",
    "freeze.mode": "this is the better figure",
    "processes": "a step has another number of images",
    "max_epochs": "the run ends after that many epochs",
}
# All others are kept as the checkpoint has them (the weights), or change no result (places, workers, compilation).


def flat(**groups: Mapping[str, Any]) -> dict[str, Any]:
    """Options of several groups by their full names, say `model.lr`."""
    return {
        f"{group}.{name}": value
        for group, options in groups.items()
        for name, value in options.items()
    }


def compare(
    saved: Mapping[str, Any], asked: Mapping[str, Any], within_epoch: bool, unfrozen: bool
) -> list[str]:
    """What differs between the options of a checkpoint and those of the run that continues from it.

    Args:
        saved: Options of the checkpoint by their full names; one that is missing in either is not compared.
        asked: Those of the run.
        within_epoch: The checkpoint was written before its epoch was over.
        unfrozen: The checkpoint was written after the unfreezing.

    Returns:
        A sentence for each change, with its effect.

    Raises:
        UserError: A change that the checkpoint would undo, or that would spoil the run.
    """
    refused = (
        REFUSED
        | (REFUSED_WITHIN_AN_EPOCH if within_epoch else {})
        | (REFUSED_UNFROZEN if unfrozen else {})
    )
    changes = []
    for name in saved.keys() & asked.keys():
        before, after = saved[name], asked[name]
        if before == after:
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            both = {
                key: (before.get(key), value)
                for key, value in after.items()
                if before.get(key) != value
            }
            before, after = ({key: pair[at] for key, pair in both.items()} for at in (0, 1))
        option = {"data.seed": "seed_everything", "data.left_out": "data.leave_out"}.get(name, name)
        if name in refused:
            written = ", which" if refused[name] == _UNDONE else "; the checkpoint"
            mend = MENDS.get(name, "leave it out")
            raise UserError(
                f"{option}={after} {refused[name]}{written} was written with {before}: {mend} to continue that "
                f"run, or begin a new one from its weights with --model.weights=CHECKPOINT."
            )
        if name in CHANGED:
            changes.append(f"{option} is changed from {before} to {after}: {CHANGED[name]}.")
    return sorted(changes)


def compare_checkpoint(
    trainer: Trainer, model: Any, data: Any, checkpoint: Mapping[str, Any]
) -> list[str]:
    """What differs between a checkpoint and the run of these that continues from it; see `compare`."""
    if "loops" not in checkpoint or "callbacks" not in checkpoint:
        raise UserError(
            "The checkpoint holds weights alone, and no run to continue: begin with --model.weights=FILE."
        )
    loops = checkpoint["loops"]["fit_loop"]
    run = checkpoint["callbacks"].get("RunFolder", {})
    saved_data = checkpoint.get(LightningDataModule.CHECKPOINT_HYPER_PARAMS_KEY, {})
    saved = flat(model=checkpoint.get("hyper_parameters", {}), data=saved_data) | run
    asked = flat(model=model.hparams, data=getattr(data, "hparams", {}))
    asked |= {"processes": trainer.world_size, "max_epochs": trainer.max_epochs}
    if isinstance(data, ImageDataModule) and data.names:  # known when it is set up
        asked["training_images"] = digest(data.names["train"])
    within = not loops["epoch_loop.batch_progress"]["is_last_batch"]
    return compare(saved, asked, within_epoch=within, unfrozen=False)


def keep_size(data: ImageDataModule, checkpoint: Mapping[str, Any]) -> None:
    """Have a run that continues decode its images as before."""
    size = NetworkDescription.from_checkpoint(checkpoint).geometry.size
    data.continue_from(EarlierRun(size=size))
