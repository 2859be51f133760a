"""What may change when a run continues from a checkpoint. Everything else is refused.

A checkpoint restores weights, optimizer, schedule and callbacks. A changed option would either have
no effect, because the restored state overrides it, or change what the run means: images that were
trained on would be validated, or epochs would differ in length. So only the options in `MAY_CHANGE`
may differ. The way out is a new run that begins with the weights of this one.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch import Callback

from cifar_transfer.base.errors import UserError
from cifar_transfer.base.primitives import as_primitive
from cifar_transfer.data.module import ImageDataModule
from cifar_transfer.data.splits import digest
from cifar_transfer.training.lightning_internals import callbacks_of, ended_epoch
from cifar_transfer.training.run import RunFolder

# An option whose name begins with one of these and a dot may change, too.
MAY_CHANGE = frozenset(
    {
        # When a run ends. Limits of batches are not among them, because they make other epochs.
        "trainer.max_epochs",
        "trainer.min_epochs",
        "trainer.max_steps",
        "trainer.min_steps",
        "trainer.max_time",
        "trainer.limit_test_batches",
        # What a run is computed with.
        "trainer.accelerator",
        "trainer.devices",
        "trainer.num_nodes",
        "trainer.strategy",
        "trainer.benchmark",
        "model.compile",
        "data.num_workers",
        "data.eval_batch_size",
        # What is shown and logged, and where files are.
        "trainer.logger",
        "trainer.log_every_n_steps",
        "trainer.enable_progress_bar",
        "trainer.enable_model_summary",
        "trainer.profiler",
        "trainer.detect_anomaly",
        "trainer.num_sanity_val_steps",
        "trainer.default_root_dir",
        "report.figures",
        "report.language",
        "data.root",
        "data.tables",
        "data.url",
        "data.cache_limit_gb",
        "data.skip_broken",  # files that break are gone, as others may be
        "data.leave_out",  # its content is compared, as `data.left_out`
    }
)
# From Python, a run continues without pretrained weights. `check_classes` compares the classes.
HYPERPARAMETERS_MAY_CHANGE = MAY_CHANGE | {"model.weights", "model.class_names"}
# Options that go by another name in a checkpoint.
COMMAND_LINE_NAMES = {
    "data.data": "data",
    "data.seed": "seed_everything",
    "data.left_out": "data.leave_out",
}


def state_of_run(checkpoint: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return what the `RunFolder` of a run has stored in a checkpoint, or None if the run had none.

    Raises:
        UserError: The checkpoint holds nothing but weights, or what no run has stored.
    """
    if "loops" not in checkpoint or "callbacks" not in checkpoint:
        raise UserError(
            "The checkpoint holds weights alone, and no run to continue: begin with "
            "--model.weights=FILE."
        )
    state = checkpoint["callbacks"].get(RunFolder.__qualname__)
    if state is None:
        return None
    try:
        dict(state["config"]["trainer"])
    except (KeyError, TypeError, ValueError):
        raise UserError(
            "The checkpoint is damaged or was altered: it has no options of its run."
        ) from None
    return state


def check_configuration(
    before: Mapping[str, Any], now: Mapping[str, Any], augment: Mapping[str, Any] | None = None
) -> None:
    """Refuse a command line that asks for another run than the one of a checkpoint.

    Args:
        before: Configuration of the run, as `config.yaml` has it.
        now: Configuration with which it would continue.
        augment: Options of the run's augmentation with the values of its preset. An option that the
            run was not given may be given now, with the value that it has had.

    Raises:
        UserError: An option that is not in `MAY_CHANGE` differs.
    """
    options_before = _options_of(before)
    options_now = _options_of(now)
    for name, value in _flat({"data": {"augment": augment or {}}}).items():
        if options_before.get(name) is None and options_now.get(name) is not None:
            options_before[name] = value
    refuse_changes(options_before, options_now, MAY_CHANGE)


def check_checkpoint(
    trainer: Trainer, model: LightningModule, data: Any, checkpoint: Mapping[str, Any]
) -> None:
    """Refuse to continue from a checkpoint with a model, data or callbacks that have other options.

    This is for `Trainer.fit(ckpt_path=...)`, which knows no command line.

    Args:
        trainer: Trainer that would continue.
        model: Module with hyper-parameters.
        data: Data module, or whatever loads the images.
        checkpoint: The checkpoint.

    Raises:
        UserError: An option differs; or the checkpoint was written within an epoch, and another
            number of processes or other images would end that epoch; or it holds nothing but
            weights.
    """
    run = state_of_run(checkpoint)
    data_options = checkpoint.get(LightningDataModule.CHECKPOINT_HYPER_PARAMS_KEY, {})
    before = {"model": checkpoint.get("hyper_parameters", {}), "data": data_options}
    now = {"model": model.hparams, "data": getattr(data, "hparams", {})}
    refuse_changes(_flat(before), _flat(now), HYPERPARAMETERS_MAY_CHANGE)
    for callback in callbacks_of(trainer):
        state = checkpoint["callbacks"].get(callback.state_key)
        if state is not None:
            check_callback(callback, state)
    if run is not None and not ended_epoch(checkpoint):
        _check_order_of_images(trainer.world_size, data, run)


def check_callback(callback: Callback, state: Mapping[str, Any]) -> None:
    """Refuse a callback whose state was stored with other options, as far as they were stored.

    `EarlyStopping` for one stores its patience, and takes the stored one over. In callbacks of
    others a value that has the name of an argument may be no option.

    Raises:
        UserError: An option differs.
    """
    if not type(callback).__module__.startswith(("lightning.", "cifar_transfer.")):
        return
    before = {}
    now = {}
    for name in inspect.signature(type(callback)).parameters:
        if name in state and hasattr(callback, name) and name != "dirpath":
            before[name] = state[name]
            now[name] = as_primitive(name, getattr(callback, name))
    name = type(callback).__name__
    refuse_changes(_flat({name: before}), _flat({name: now}), frozenset())


def _check_order_of_images(processes: int, data: Any, run: Mapping[str, Any]) -> None:
    """Refuse what would skip or repeat images of the epoch in which a run was stopped."""
    if run["processes"] != processes:
        raise UserError(
            f"The run was stopped within an epoch of {run['processes']} processes, and now there "
            f"are {processes}, which would skip or repeat images: continue with as many until the "
            f"epoch is over."
        )
    if isinstance(data, ImageDataModule) and data.names:  # it is set up
        images = digest(data.names["train"])
        if run["training_images"] != images:
            raise UserError(
                f"The run was stopped within an epoch of {run['training_images']} for training, "
                f"and now there are {images}, which would skip or repeat some: have the images as "
                f"they were to continue the run, or begin a new one from its weights with "
                f"--model.weights=CHECKPOINT."
            )


def refuse_changes(
    before: Mapping[str, Any], now: Mapping[str, Any], may_change: frozenset[str] = MAY_CHANGE
) -> None:
    """Refuse options that differ from those with which a run began.

    Args:
        before: Options of the run by their full names, such as "model.lr", as primitives.
        now: Options with which it would continue. One that either side lacks is not compared.
        may_change: Options, and groups of options, that may differ.

    Raises:
        UserError: An option differs.
    """
    for name, value in now.items():
        if name not in before or before[name] == value or _is_among(name, may_change):
            continue
        option = COMMAND_LINE_NAMES.get(name, name)
        raise UserError(
            f"{option}={_shown(value)} differs from {_shown(before[name])}, with which the run "
            f"began: leave it out to continue the run, or begin a new one from its weights with "
            f"--model.weights=CHECKPOINT."
        )


def _is_among(name: str, names: frozenset[str]) -> bool:
    """Return whether an option, or a group of options that it belongs to, is among the names."""
    while name:
        if name in names:
            return True
        name = name.rpartition(".")[0]
    return False


def _shown(value: Any) -> str:
    """Return a value as the command line takes it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)


def _options_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a configuration by their names.

    Those of callbacks go by the name of the class, as "EarlyStopping.patience".
    """
    trainer = dict(config["trainer"])
    callbacks = trainer.pop("callbacks", None) or []
    if isinstance(callbacks, Mapping):
        callbacks = [callbacks]
    options = _flat({**config, "trainer": trainer})
    names = []
    for callback in callbacks:
        name = callback["class_path"].rpartition(".")[2]
        if not name.endswith("ProgressBar"):
            names.append(name)
            options.update(_flat({name: callback.get("init_args", {})}))
    options["trainer.callbacks"] = names
    return options


def _flat(options: Mapping[str, Any], group: str = "") -> dict[str, Any]:
    """Return nested options by their full names.

    The options of a class go by the name of the option that names the class, as on the command
    line.
    """
    flat = {}
    for name, value in options.items():
        full_name = f"{group}{name}"
        if not isinstance(value, Mapping):
            flat[full_name] = value
        elif "class_path" in value:
            flat[full_name] = value["class_path"]
            flat.update(_flat(value.get("init_args") or {}, f"{full_name}."))
        else:
            flat.update(_flat(value, f"{full_name}."))
    return flat
