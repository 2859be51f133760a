"""The command line of `fit`: Lightning's, with the classes of this package, and `--resume`.

`PlainCLI` has the options, the model and the data; `FitCLI` adds the run that they describe.
"""

import json
import math
import os
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from lightning import LightningDataModule, Trainer
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LearningRateMonitor, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger

from cifar_transfer.base import console
from cifar_transfer.base.errors import UserError, caused_by_us, check, raised_by_own_code
from cifar_transfer.base.files import CONFIG, LOGS, RESULT, require_writable, user_path
from cifar_transfer.base.text import without_password
from cifar_transfer.base.untrusted import read_yaml
from cifar_transfer.cli import parser_messages, recipes, spelling, start, text_options
from cifar_transfer.cli.parser_messages import plain_message
from cifar_transfer.cli.parsers import HELP_HINT
from cifar_transfer.data import splits
from cifar_transfer.data.augment import PRESETS
from cifar_transfer.data.augment_options import Augment
from cifar_transfer.data.module import EarlierRun, ImageDataModule
from cifar_transfer.network.description import NetworkDescription
from cifar_transfer.network.image_classifier import built_from
from cifar_transfer.training import foreign_config, resume
from cifar_transfer.training.checkpoint_file import RECORDED_RUN_KEY, read_checkpoint
from cifar_transfer.training.classifier import TransferClassifier
from cifar_transfer.training.evaluation import DATA_MODULES
from cifar_transfer.training.freeze import BackboneFreeze
from cifar_transfer.training.interrupt import Interrupt
from cifar_transfer.training.lightning_internals import (
    has_temporary_processes,
    requeued_checkpoint,
)
from cifar_transfer.training.logger import RunLogger
from cifar_transfer.training.loss_guard import LossGuard
from cifar_transfer.training.metrics_logger import MetricsLogger
from cifar_transfer.training.progress_bar import OneLineProgressBar
from cifar_transfer.training.report import LOG_INTERVAL, Report
from cifar_transfer.training.run import (
    BEST,
    CHECKPOINTS,
    LAST,
    Progress,
    RunFolder,
    RunTrainer,
    named_folder,
)
from cifar_transfer.training.run_checkpoints import AtomicCheckpointIO, RunCheckpoint

FOLDER_OPTION = "--trainer.default_root_dir"
# A run that begins with the options of another one has its own.
OPTIONS_OF_ONE_RUN = ("resume", "ckpt_path", "run")
PRESET_OPTION = "--data.augment"
# Options of the Trainer that are a number of batches or a share of them.
BATCH_LIMITS = (
    "limit_train_batches",
    "limit_val_batches",
    "limit_test_batches",
    "limit_predict_batches",
    "overfit_batches",
)


class Parser(LightningArgumentParser):
    """Lightning's parser, whose errors are a `UserError` without a page of usage before it.

    Attributes:
        texts: Values of options by what has replaced them, see `text_options`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)  # also for the parsers that it makes for classes
        super().__init__(*args, **kwargs)
        self.texts: dict[str, str] = {}

    def dump(self, cfg: Any, *args: Any, **kwargs: Any) -> str:
        """Return options as YAML, also for `--print_config`."""
        cfg = cfg.clone()
        text_options.put_in(cfg, self.texts)
        return super().dump(cfg, *args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise a `UserError` with jsonargparse's message and a hint."""
        if ex is not None and isinstance(ex.__cause__, UserError):  # of a link between options
            raise ex.__cause__
        own_error = raised_by_own_code(ex)
        if own_error is not None:
            raise own_error from None
        message = plain_message(message)
        option = parser_messages.unknown_option(message)
        if option is not None:
            raise spelling.unknown_option(option, start.option_names("fit"))
        argument = parser_messages.unknown_argument(message)
        if argument is not None:
            raise spelling.no_option(argument)
        group = parser_messages.group_with_a_value(message)
        if group is not None:
            names = start.option_names("fit")
            raise spelling.group_given_a_value(f"--{group[0]}", group[1], names)
        name = parser_messages.unknown_class(message, "data")
        if name is not None:
            raise UserError(
                f"--data={name} names no data module. Data modules: "
                f"{', '.join(sorted(DATA_MODULES))}, or MODULE.CLASS of your own. ({HELP_HINT})"
            )
        raise UserError(f"{message}{self._hint(message)}")

    def _hint(self, message: str) -> str:
        key = parser_messages.unknown_key(message)
        if key is not None:
            similar_keys = spelling.similar(key, self.get_defaults().keys())
            if similar_keys:
                return f" (Did you mean {', '.join(similar_keys)}?)"
        if parser_messages.is_import_refusal(message):
            return " (If you trust it, name it on the command line too.)"
        if HELP_HINT in message:  # the parser of a class has said it
            return ""
        return f" ({HELP_HINT})"


class PlainCLI(LightningCLI):
    """The options of `fit`, the model and the data that they name, and a plain Trainer.

    The Trainer keeps nothing: it has no folder, logger, checkpoints, callbacks or progress bar. It
    is for passes over the images other than training, with loaders that share them out over
    processes.

    Args:
        args: Options as on the command line.

    Attributes:
        model: The `TransferClassifier`.
        datamodule: The data module.
        trainer: The Trainer.
        config: All options, parsed.
        arguments: The options as they were given.

    Raises:
        UserError: A mistake in the options, the data or the weights.
    """

    def __init__(self, args: Sequence[str]) -> None:
        self.arguments = list(args)
        console.hush()
        super().__init__(
            TransferClassifier,
            ImageDataModule,
            save_config_callback=None,  # `RunFolder` writes it, once the run is accepted
            subclass_mode_data=True,
            seed_everything_default=0,
            trainer_defaults={
                "max_epochs": 40,
                "log_every_n_steps": LOG_INTERVAL,
                "enable_model_summary": False,
            },
            load_from_checkpoint_support=False,  # the classes record their own options
            auto_configure_optimizers=False,
            parser_class=Parser,
            run=False,
            args=list(args),
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of callbacks, the two ways to continue, and links between classes."""
        parser.add_lightning_class_args(BackboneFreeze, "freeze")
        parser.add_lightning_class_args(Report, "report")
        parser.add_argument(
            "--ckpt_path", type=str | None, help="Checkpoint to continue from, in a new run."
        )
        parser.add_argument(
            "--resume", type=str | None, help="Folder of a run to continue in place."
        )
        parser.add_argument(
            "--run",
            type=str | None,
            help="Name of the folder of a new run in lightning_logs/; null for version_N.",
        )
        parser.set_defaults({"data": {"class_path": "cifar_transfer.CIFAR10DataModule"}})
        parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=_integer_seed)
        parser.link_arguments("data.class_names", "model.class_names", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the options; a `UserError` refuses those that continue a run."""
        self.config = _parse(parser, recipes.with_recipe_files(args))
        for name in OPTIONS_OF_ONE_RUN:
            if self.config[name]:
                raise UserError(f"--{name} is for fit: leave it out.")

    def instantiate_classes(self) -> None:
        """Make data, model and Trainer; whatever is wrong with an option is a `UserError`."""
        try:
            super().instantiate_classes()
        except (UserError, ValueError, TypeError) as error:
            # Ours, jsonargparse's around one of ours, or the Trainer's.
            ours = caused_by_us(error)
            if ours is not None:
                raise self.named_as_options(ours) from error
            own_error = raised_by_own_code(error)
            if own_error is not None:
                raise own_error from None
            raise UserError(plain_message(str(error))) from error
        if has_temporary_processes(self.trainer):
            raise UserError(
                f"--trainer.strategy={self.config.trainer.strategy} starts processes that end with "
                f"their results: take ddp."
            )
        on_cpu = self.trainer.strategy.root_device.type == "cpu"
        if self.config.trainer.sync_batchnorm and on_cpu and self.trainer.world_size > 1:
            raise UserError(
                "sync_batchnorm=true needs GPUs: leave it out on CPUs, where each process takes "
                "the statistics of its own batch."
            )

    def named_as_options(self, error: UserError) -> UserError:
        """Return an error with options of the command line, `--model.lr=`, in place of `lr=`."""
        return UserError(_named_as_options(str(error), list(self.config.keys())))

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make a Trainer that keeps nothing, with the devices and the precision of the options.

        Args:
            **kwargs: Options of the Trainer that replace those of the command line.
        """
        options = dict(self.config_init.trainer) | cudnn_benchmark(self.config_init.trainer)
        allow_tf32()
        options |= {
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "callbacks": [],
            "use_distributed_sampler": False,
            "limit_test_batches": None,
            "fast_dev_run": False,
        }
        return Trainer(**options | kwargs)


class FitCLI(PlainCLI):
    """The options of `fit` and the run that they describe.

    A run that continues is compared with the options in its checkpoint, before anything is decoded.

    Attributes:
        config_text: Text of the run's `config.yaml`, without passwords.
        ckpt_path: Checkpoint from which training continues, or None.
        folder: Folder of the run.
        best: Callback that keeps the best checkpoint; None if the run keeps no checkpoints.
        interrupt: Callback that stops the run when it is told to.
    """

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the options; they override those of a run to resume."""
        args = recipes.with_recipe_files(args)
        self._resumed_run = _resumed_run(args)
        if self._resumed_run is not None:
            foreign_config.import_nothing_else(args)
            args = ["--config", str(self._resumed_run / CONFIG), *args]
        self.config = _parse(parser, args)
        if self.config.resume and self._resumed_run is None:
            raise UserError("resume is in a file of options: give --resume on the command line.")
        if self.config.resume and self.config.run:
            raise UserError("--resume continues a run under the name that it has: leave --run out.")
        self.ckpt_path = self._path_to_continue_from()
        options = self.config.clone()
        for name in OPTIONS_OF_ONE_RUN:
            options.pop(name)
        self.config_text = without_password(parser.dump(options, skip_unset=False))

    def _path_to_continue_from(self) -> Path | None:
        if self._resumed_run is not None:
            path = self._resumed_run / CHECKPOINTS / LAST
            return path if path.is_file() else None  # killed in its first epoch: begin again
        if self.config.ckpt_path is not None:
            return user_path(self.config.ckpt_path)
        if self.config.run is not None:
            return self._requeued_checkpoint(self.config.run)
        return None

    def _requeued_checkpoint(self, name: str) -> Path | None:
        """Return the checkpoint with which SLURM starts a run with a name again, or None.

        The run then continues in its folder, as with `--resume`. Lightning by itself loads that
        checkpoint into a new run, whose folder cannot have the same name. Seen by test_stopped.py,
        test_lightning_requeues_a_slurm_job_and_the_run_goes_on_from_there.
        """
        root = _root(self.config.trainer)
        path = requeued_checkpoint(root)
        folder = named_folder(root / LOGS, name)
        if path is None or not folder.is_dir() or (folder / RESULT).is_file():
            return None
        if splits.run_of(folder) != read_checkpoint(path).get(RECORDED_RUN_KEY):
            return None
        self._resumed_run = folder
        return path

    def before_instantiate_classes(self) -> None:
        """Read the checkpoint, and refuse options that would make another run of it."""
        self._checkpoint: dict[str, Any] | None = None
        if self.ckpt_path is None:
            return
        self._checkpoint = read_checkpoint(self.ckpt_path)
        state = resume.state_of_run(self._checkpoint)
        if state is not None:  # else the run was none of the command line
            resume.check_configuration(
                state["config"],
                yaml.safe_load(self.config_text),
                _stored_augment(self._checkpoint),
            )

    def instantiate_classes(self) -> None:
        """Make data, model and Trainer; check that a run may continue, and lock its folder."""
        if self._checkpoint is None:
            super().instantiate_classes()
        else:
            self._instantiate_from(self._checkpoint)
            self._checkpoint = None  # its weights take memory
        if self._resumed_run is not None:
            foreign_config.check_places(self.trainer, self._resumed_run)
        if self.trainer.is_global_zero:
            self.folder.lock()

    def _instantiate_from(self, checkpoint: dict[str, Any]) -> None:
        """Make the classes of a run that continues; its checkpoint holds the weights."""
        description = NetworkDescription.from_checkpoint(checkpoint)
        with built_from(description):
            super().instantiate_classes()
        geometry = description.geometry
        self.datamodule.continue_from(
            EarlierRun(
                size=geometry.size,
                grey_range=geometry.grey_range,
                augment=_stored_augment(checkpoint),
            )
        )
        resume.check_checkpoint(self.trainer, self.model, self.datamodule, checkpoint)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the Trainer of the run.

        Args:
            **kwargs: Options of the Trainer that replace those of the command line.
        """
        options = self.config_init.trainer
        _check_trainer_options(options)
        self.folder = self._run_folder(options)
        allow_tf32()
        trainer_options = dict(options) | cudnn_benchmark(options)
        trainer_options["logger"] = self._loggers(options)
        trainer_options["callbacks"] = self._callbacks(options)
        trainer_options["plugins"] = _plugins(options)
        trainer_options["enable_progress_bar"] = _has_progress_bar(options)
        if options.fast_dev_run:
            return Trainer(**trainer_options | kwargs)
        return RunTrainer(self.folder, **trainer_options | kwargs)

    def _run_folder(self, options: Any) -> RunFolder:
        logs = _root(options) / LOGS
        folder = RunFolder(logs, self.config_text, self._resumed_run, self.config.run)
        require_writable(folder.path, FOLDER_OPTION)
        return folder

    def _loggers(self, options: Any) -> list[Logger]:
        """Return the user's loggers, or else TensorBoard's, and the one of `metrics.csv`."""
        progress = None
        if self._resumed_run is not None:
            progress = Progress()
            if self._checkpoint is not None:
                progress = Progress.of(self._checkpoint)
        metrics = MetricsLogger(self.folder, progress)
        if options.logger is False:
            return [metrics]
        if options.logger is None or options.logger is True:
            return [RunLogger(self.folder, progress), metrics]
        return [*_as_list(options.logger), metrics]

    def _callbacks(self, options: Any) -> list[Callback]:
        """Return the user's callbacks, those with options of their own, and those of every run."""
        callbacks: list[Callback] = []
        if not options.fast_dev_run:
            callbacks.append(self.folder)  # first, because others write into it
        callbacks += _as_list(options.callbacks)
        callbacks += [self.config_init.freeze, self.config_init.report, LossGuard()]
        self.best: RunCheckpoint | None = None
        last: RunCheckpoint | None = None
        if options.enable_checkpointing is not False and not options.fast_dev_run:
            self.best = RunCheckpoint(self.folder, BEST, monitor=self.config_init.report.best)
            last = RunCheckpoint(self.folder, LAST)
            callbacks += [self.best, last]
        self.interrupt = Interrupt(last)
        callbacks.append(self.interrupt)
        if self._logs_rates_by_step(options):
            callbacks.append(LearningRateMonitor("step"))
        if _has_progress_bar(options) and not _own_progress_bars(options):
            callbacks.append(OneLineProgressBar())
        return callbacks

    def _logs_rates_by_step(self, options: Any) -> bool:
        """Return whether the learning rate is logged by step; a plateau changes it by epoch."""
        return not options.fast_dev_run and self.config.model.schedule != "plateau"


def _stored_augment(checkpoint: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the options of the augmentation in a checkpoint, or None if it has none."""
    options = checkpoint.get(LightningDataModule.CHECKPOINT_HYPER_PARAMS_KEY)
    augment = None
    if isinstance(options, Mapping):
        augment = options.get("augment")
    if isinstance(augment, Mapping):
        return augment
    return None


def _parse(parser: LightningArgumentParser, args: Sequence[str]) -> Any:
    """Parse options, after a look at their files, whose mistakes jsonargparse tells at length."""
    for file in _values_of(("-c", "--config"), args):
        if os.path.isfile(file) and not isinstance(read_yaml(Path(file)), dict):
            raise UserError(
                f"{file} has no options: give them as YAML, for example `model:` and below it, "
                f"indented, `lr: 0.001`."
            )
    assert isinstance(parser, Parser)
    options = _with_presets(args)
    names = _values_of(("--data",), options)
    if not names or names[-1].rpartition(".")[2] in DATA_MODULES:  # else its options may be numbers
        options, parser.texts = text_options.without_texts(options)
    config = parser.parse_args(options)
    text_options.put_in(config, parser.texts)
    return config


def _with_presets(args: Sequence[str]) -> list[str]:
    """Return options in which `--data.augment=photos` has become the options of that preset."""
    options = []
    value_follows = False
    for arg in args:
        if value_follows:
            options.append(_preset(arg))
        elif arg.startswith(f"{PRESET_OPTION}="):
            options.append(f"{PRESET_OPTION}={_preset(arg.removeprefix(f'{PRESET_OPTION}='))}")
        else:
            options.append(arg)
        value_follows = arg == PRESET_OPTION
    return options


def _preset(name: str) -> str:
    """Return the options of a preset as JSON; a file of options or such options stay as they are.

    Raises:
        UserError: It is none of these.
    """
    if name in PRESETS:
        return json.dumps(asdict(Augment(preset=name)))  # type: ignore[arg-type] # it is one
    if not _is_file_or_yaml(name):
        raise UserError(
            f"{PRESET_OPTION}={name}: the presets of augmentation are {', '.join(PRESETS)}; "
            f"options of its own are --data.augment.flip=0.5 and others."
        )
    return name


def _is_file_or_yaml(value: str) -> bool:
    return "{" in value or ":" in value or Path(value).is_file()


def _root(options: Any) -> Path:
    """Return the folder that holds the folder of the runs, given options of the Trainer."""
    return user_path(options.default_root_dir or ".").resolve()


def _resumed_run(args: Sequence[str]) -> Path | None:
    """Return the folder of the run that options resume, if they do."""
    folders = _values_of(("--resume",), args)
    if not folders:
        return None
    run = user_path(folders[-1])
    if not (run / CONFIG).is_file():
        raise UserError(
            f"--resume {run}: there is no {run / CONFIG}: name the folder of a run, "
            f"{LOGS}/version_0."
        )
    return run.resolve()


def _values_of(names: Collection[str], args: Sequence[str]) -> list[str]:
    """Return the values of an option, before all options are parsed.

    Args:
        names: Names of the option. A value is given as `--name=value` or `--name value`.
        args: Options of the command line.
    """
    values = []
    for index, arg in enumerate(args):
        name, equals, value = arg.partition("=")
        if name not in names:
            continue
        if equals:
            values.append(value)
        elif index + 1 < len(args):
            values.append(args[index + 1])
    return values


def _integer_seed(seed: bool | int) -> int:
    if isinstance(seed, bool):
        raise UserError(
            f"seed_everything is {str(seed).lower()}: give a number, because the data follow from "
            f"it."
        )
    check("seed_everything", seed, lambda n: 0 <= n < 2**32, "a number from 0 to 4294967295")
    return seed


def _named_as_options(text: str, keys: Sequence[str]) -> str:
    """Return a text in which "lr=" has become "--model.lr=" for each of the keys, "model.lr"."""
    for key in keys:
        option = key.replace(".init_args.", ".")
        name = option.rpartition(".")[2]
        text = re.sub(rf"(?<![\w.-]){name}=", f"--{option}=", text)
    return text


def _is_number_of_batches(value: Any) -> bool:
    return 0 <= value < math.inf


def _check_batch_limits(options: Any) -> None:
    """Refuse a run without batches, and what Lightning does not look at if another replaces it."""
    if options.limit_val_batches == 0:
        raise UserError(
            "limit_val_batches=0: the schedule and the choice of the checkpoint need validation "
            "images."
        )
    if options.limit_train_batches == 0:
        raise UserError(
            "limit_train_batches=0 trains nothing: give a number of batches, or a share of them in "
            "(0, 1]. To score a checkpoint there is the command evaluate."
        )
    for name in BATCH_LIMITS:
        value = getattr(options, name)
        if value is not None:
            check(name, value, _is_number_of_batches, "a number of batches or a share of them")


def _check_trainer_options(options: Any) -> None:
    """Refuse values that Lightning takes, and that give a run without validation, end or steps."""
    _check_batch_limits(options)
    if options.barebones:
        raise UserError(
            "barebones=true leaves out the log, the checkpoints and all else that a run is chosen "
            "by."
        )
    if options.max_epochs is None and options.max_steps == -1 and options.max_time is None:
        raise UserError(
            "max_epochs is null, which Lightning takes for 1000: give a number, or -1 for no end."
        )
    check(
        "accumulate_grad_batches",
        options.accumulate_grad_batches,
        lambda batches: batches >= 1,
        "1 batch or more",
    )
    if options.check_val_every_n_epoch is not None:
        check(
            "check_val_every_n_epoch",
            options.check_val_every_n_epoch,
            lambda epochs: epochs >= 1,
            "1 epoch or more, or null",
        )
    if options.gradient_clip_val is not None:
        check(
            "gradient_clip_val",
            options.gradient_clip_val,
            lambda norm: 0 <= norm < math.inf,
            "0 (off) or more",
        )
    for callback in _as_list(options.callbacks):
        if isinstance(callback, BackboneFreeze):
            raise UserError(
                "trainer.callbacks names a second BackboneFreeze: give the first one phases, "
                "--freeze.phases."
            )


def allow_tf32() -> None:
    """Let GPUs multiply matrices in TF32, as cuDNN's convolutions do by default."""
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")


def cudnn_benchmark(options: Any) -> dict[str, Any]:
    """Return the option of the Trainer that has cuDNN choose its fastest algorithms.

    Args:
        options: Options of the Trainer that were given.
    """
    if options.benchmark is None and not options.deterministic:
        return {"benchmark": True}  # cuDNN's; there are few sizes of batches
    return {}


def _plugins(options: Any) -> list[Any]:
    """Return the user's plugins, with one that writes checkpoints whole."""
    plugins = _as_list(options.plugins)
    if any(isinstance(plugin, CheckpointIO) for plugin in plugins):
        return plugins
    return [*plugins, AtomicCheckpointIO()]


def _has_progress_bar(options: Any) -> bool:
    """Return whether there is a progress bar: one of the user's own, or ours on a terminal."""
    if options.enable_progress_bar is False:
        return False
    is_shown = sys.stdout.isatty() or console.is_notebook()
    return bool(_own_progress_bars(options)) or is_shown


def _own_progress_bars(options: Any) -> list[ProgressBar]:
    callbacks = _as_list(options.callbacks)
    return [callback for callback in callbacks if isinstance(callback, ProgressBar)]


def _as_list(value: Any) -> list[Any]:
    """Return the values of an option that takes nothing, one value, or a list of them."""
    if value is None:
        return []
    if isinstance(value, list):
        return value
    return [value]
