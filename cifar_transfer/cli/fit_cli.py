"""The command line of `fit`: Lightning's, with our classes, our defaults and `--resume`."""

import argparse
import math
import os
import re
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch
from lightning import Trainer
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LearningRateMonitor, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from cifar_transfer.base import console
from cifar_transfer.base.errors import UserError, caused_by_us, check
from cifar_transfer.base.files import CONFIG, LOGS, require_writable
from cifar_transfer.base.text import without_password
from cifar_transfer.base.untrusted import read_yaml
from cifar_transfer.cli import recipes, spelling, start
from cifar_transfer.cli.parser_messages import plain_message
from cifar_transfer.cli.parsers import HELP_HINT
from cifar_transfer.data.module import ImageDataModule
from cifar_transfer.network.image_classifier import NetworkDescription, built_from
from cifar_transfer.training import run as runs
from cifar_transfer.training.checkpoint_file import read_checkpoint
from cifar_transfer.training.classifier import TransferClassifier
from cifar_transfer.training.evaluation import DATA_MODULES
from cifar_transfer.training.freeze import BackboneFreeze
from cifar_transfer.training.interrupt import Interrupt
from cifar_transfer.training.logger import RunLogger
from cifar_transfer.training.loss_guard import Guard
from cifar_transfer.training.progress_bar import OneLineProgressBar
from cifar_transfer.training.report import LOG_INTERVAL, Report
from cifar_transfer.training.resume import compare_checkpoint, keep_size

ROOT = "--trainer.default_root_dir"
UNKNOWN = "unrecognized arguments: --"


class Parser(LightningArgumentParser):
    """Lightning's parser, whose errors are a `UserError` without a page of usage before it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(
            *args, **{"allow_abbrev": False} | kwargs
        )  # also of the parsers it makes for classes

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise a `UserError` with jsonargparse's message and a hint."""
        if ex is not None and isinstance(ex.__cause__, UserError):  # from the link of the seed
            raise ex.__cause__
        message, unknown = plain_message(message), None
        if message.startswith(UNKNOWN):
            name = message.removeprefix(UNKNOWN).partition("=")[0]
            raise spelling.unknown_option(f"--{name}", start.option_names("fit"))
        if isinstance(ex, KeyError):
            unknown = message.split("'")[1]
        hint = "" if HELP_HINT in message else f" ({HELP_HINT})"  # a nested parser has said it
        if near := spelling.similar(unknown or "", self.get_defaults().keys()):
            hint = f" (Did you mean {', '.join(near)}?)"
        elif "is not allowed" in message:
            hint = " (If you trust it, name it on the command line too.)"
        elif 'key "data"' in message and "import path" in message:
            names = sorted(DATA_MODULES)
            hint = f" (Data modules: {', '.join(names)}.)"
        raise UserError(message + hint)


class PlainCLI(LightningCLI):
    """The options of `fit`, the model and the data that they name, and a plain Trainer.

    The Trainer keeps nothing: it has no folder, logger, checkpoints, callbacks or progress bar. It is for
    passes over the images other than training, with loaders that share them out over the processes.

    Args:
        args: Options as on the command line.

    Attributes:
        model: The `TransferClassifier`.
        datamodule: The data module.
        trainer: The Trainer.
        config: All options, parsed.

    Raises:
        UserError: A mistake in the options, the data or the weights.
    """

    def __init__(self, args: Sequence[str]) -> None:
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
        """The callback's options, the two ways to continue, and what links the classes."""
        parser.add_lightning_class_args(BackboneFreeze, "freeze")
        parser.add_lightning_class_args(Report, "report")
        parser.add_argument(
            "--ckpt_path", type=str | None, help="Checkpoint to continue from, in a new run."
        )
        parser.add_argument(
            "--resume", type=str | None, help="Folder of a run to continue in place."
        )
        parser.set_defaults({"data": {"class_path": "cifar_transfer.CIFAR10DataModule"}})
        parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=_integer_seed)
        parser.link_arguments("data.class_names", "model.class_names", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the options; a `UserError` refuses those that continue a run."""
        self.config = parser.parse_args(recipes.with_recipe_files(args))
        for name in ("resume", "ckpt_path"):
            if self.config[name]:
                raise UserError(f"--{name} is for fit: leave it out.")

    def instantiate_classes(self) -> None:
        """Make model, data and Trainer; whatever is wrong with an option is a `UserError`."""
        try:
            super().instantiate_classes()
        except (UserError, ValueError, TypeError) as error:
            # Ours, jsonargparse's around one of ours, or the Trainer's.
            ours = caused_by_us(error)
            if ours is None:
                raise UserError(plain_message(str(error))) from None
            raise self.named_as_options(ours) from None

    def named_as_options(self, error: UserError) -> UserError:
        """The same error for the command line: it names arguments, `lr=`, and here they are options, `--model.lr=`."""
        text = str(error)
        for key in self.config.keys():  # noqa: SIM118 # a Namespace
            option = key.replace(".init_args.", ".")
            text = re.sub(rf"(?<![\w.-]){option.rpartition('.')[2]}=", f"--{option}=", text)
        return UserError(text)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make a Trainer that keeps nothing, with the devices, strategy and precision of the options."""
        options = dict(self.config_init.trainer) | speed_options(self.config_init.trainer)
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
    """The options of `fit` and the run that they describe: its folder, its callbacks, its Trainer."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Put the configuration of a run to resume before the options, so that these override it."""
        args = recipes.with_recipe_files(args)
        resume = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        resume.add_argument("--resume")
        resume.add_argument("--config", action="append", default=[])
        resume.error = parser.error  # type: ignore[method-assign]
        given = resume.parse_known_args(args)[0]
        run, files = given.resume, given.config
        if run:
            config = Path(run, CONFIG)
            if not config.is_file():
                raise UserError(
                    f"--resume {run}: there is no {config}: name the folder of a run, {LOGS}/version_0."
                )
            runs.import_nothing_else(args)
            args, files = ["--config", str(config), *args], [config, *files]
        for file in filter(os.path.isfile, files):
            read_yaml(file)
        self.config = parser.parse_args(args)
        kept = self.config.clone()  # the configuration as given, but for what continues another run
        for name in ("resume", "ckpt_path"):
            kept.pop(name)
        self.config_text = without_password(self.parser.dump(kept, skip_unset=False))
        root = Path(self.config.trainer.default_root_dir or ".")
        self.resumed = Path(run).resolve() if run else None
        if self.resumed is None:
            self.resumed = runs.requeued_run(root.resolve() / LOGS, self.config_text)
        if self.resumed:
            state = runs.newest_state(self.resumed)
            self.config.ckpt_path = (
                str(state) if state else None
            )  # killed in its first epoch: from the beginning

    def before_instantiate_classes(self) -> None:
        """Read the checkpoint of a run that continues."""
        self._continued: dict[str, Any] | None = None
        if path := self.config.ckpt_path:
            self._continued = read_checkpoint(path)

    def instantiate_classes(self) -> None:
        """Make the classes, and lock a run that continues.

        A checkpoint holds all weights, so none are fetched for its network.
        """
        network_of_checkpoint: AbstractContextManager[None] = nullcontext()
        if self._continued is not None:
            description = NetworkDescription.from_checkpoint(self._continued)
            network_of_checkpoint = built_from(description)
        with network_of_checkpoint:
            super().instantiate_classes()
        if self.resumed:
            runs.check_places(self.trainer, self.resumed)
        if self._continued:
            compare_checkpoint(
                self.trainer, self.model, self.datamodule, self._continued
            )  # before anything is decoded
            keep_size(self.datamodule, self._continued)
        self.folder.lock(self.trainer)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add logger, checkpoints and terminal unless the options name others or want none."""
        options = self.config_init.trainer
        _check_trainer(options)
        if any(isinstance(callback, BackboneFreeze) for callback in _listed(options.callbacks)):
            raise UserError(
                "trainer.callbacks names a second BackboneFreeze: give the first one phases, --freeze.phases."
            )
        root = Path(options.default_root_dir or ".").resolve()
        ours = options.logger is None or options.logger is True
        if options.default_root_dir:
            require_writable(root, ROOT)
        elif ours:
            require_writable(self.resumed or root / LOGS, ROOT)
        state = self.config.ckpt_path
        self.folder = runs.RunFolder(self.config_text, self.resumed, Path(state) if state else None)
        own_bar = any(isinstance(callback, ProgressBar) for callback in _listed(options.callbacks))
        bar = options.enable_progress_bar is not False and sys.stdout.isatty() and not own_bar
        if not (bar or own_bar):
            kwargs["enable_progress_bar"] = False
        bars = [OneLineProgressBar()] if bar else []
        # First, because others ask for the run's folder when training starts.
        folders = [] if options.fast_dev_run else [self.folder]
        kwargs["callbacks"] = [
            *folders,
            *_listed(options.callbacks),
            self.config_init.freeze,
            self.config_init.report,
            *self._callbacks(options),
            *bars,
        ]
        if ours:
            resumed = self.resumed
            kwargs["logger"] = (
                RunLogger(resumed.parent, resumed.name) if resumed else RunLogger(root / LOGS)
            )
        plugins = _listed(options.plugins)
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*plugins, runs.AtomicCheckpointIO()]
        return Trainer(**dict(options) | speed_options(options) | kwargs)

    def _callbacks(self, options: Any) -> list[Callback]:
        """What every run has beside the user's own callbacks."""
        callbacks: list[Callback] = [Guard()]
        self.best = runs.RunCheckpoint("best", "val/acc", in_place=bool(self.resumed))
        last = None
        if options.enable_checkpointing is not False and not options.fast_dev_run:
            last = runs.RunCheckpoint("last", in_place=bool(self.resumed))
            callbacks += [self.best, last]
        self.interrupt = Interrupt(last)
        callbacks.append(self.interrupt)
        if (
            self.config.model.schedule != "plateau"
            and options.logger is not False
            and not options.fast_dev_run
        ):
            callbacks.append(
                LearningRateMonitor("step")
            )  # a plateau changes it between epochs only
        return callbacks


def speed_options(options: Any) -> dict[str, Any]:
    """Return options of the Trainer that make it faster; on a GPU, also let matrices be multiplied in TF32."""
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")  # as cuDNN's convolutions do by default
    if options.benchmark is None and not options.deterministic:
        return {"benchmark": True}  # cuDNN's; there are few sizes of batches
    return {}


def _listed(value: Any) -> list[Any]:
    """An option that takes nothing, one thing, or a list of them."""
    return value if isinstance(value, list) else [] if value is None else [value]


def _check_trainer(options: Any) -> None:
    """Refuse values that Lightning takes and that end in a run without validation, end or training."""
    if options.limit_val_batches == 0:
        raise UserError(
            "limit_val_batches=0: the schedule and the choice of the checkpoint need validation images."
        )
    if options.barebones:
        raise UserError(
            "barebones=true leaves out the log, the checkpoints and all else that a run is chosen by."
        )
    if options.max_epochs is None and options.max_steps == -1 and options.max_time is None:
        raise UserError(
            "max_epochs is null, which Lightning takes for 1000: give a number, or -1 for no end."
        )
    check(
        "accumulate_grad_batches",
        options.accumulate_grad_batches,
        lambda n: n >= 1,
        "1 batch or more",
    )
    every = options.check_val_every_n_epoch
    check(
        "check_val_every_n_epoch", every, lambda n: n is None or n >= 1, "1 epoch or more, or null"
    )
    if options.gradient_clip_val is not None:
        check(
            "gradient_clip_val",
            options.gradient_clip_val,
            lambda x: 0 <= x < math.inf,
            "0 (off) or more",
        )


def _integer_seed(seed: bool | int) -> int:
    if isinstance(seed, bool):
        raise UserError(
            f"seed_everything is {str(seed).lower()}: give a number, for the data follow from it."
        )
    check("seed_everything", seed, lambda n: 0 <= n < 2**32, "a number from 0 to 4294967295")
    return seed
