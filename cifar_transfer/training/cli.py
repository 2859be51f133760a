"""The command line of `fit`: Lightning's, with our classes, our defaults, `--resume` and `--find_lr`."""

import argparse
import difflib
import math
import re
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from jsonargparse import ActionYesNo
from lightning import Trainer
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import LearningRateMonitor, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only

from cifar_transfer import console
from cifar_transfer.data.module import ImageDataModule
from cifar_transfer.errors import UserError, check, taken
from cifar_transfer.results.predictions import PROJECTED, CollectPredictions
from cifar_transfer.results.report import Report
from cifar_transfer.training import find_lr
from cifar_transfer.training import run as runs
from cifar_transfer.training.checkpoint import LOGS, read_checkpoint
from cifar_transfer.training.classifier import TransferClassifier
from cifar_transfer.training.finite_loss import Guard
from cifar_transfer.training.freeze import BackboneFreeze
from cifar_transfer.training.interrupt import Interrupt
from cifar_transfer.training.run import trim_events

HELP = """\
usage: python -m cifar_transfer.fit [--config FILE] [--option=VALUE ...]

Take a pretrained network, give it a new head, train the head, then everything. What people change first:

  --model.backbone=resnet50          another network; python -m cifar_transfer.backbones lists them
  --model.weights=FILE               its weights: a file, a name, or none
  --model.image_size=64              pixels that images are resized to; native: as the weights were trained
  --data=ImageFolderDataModule       your own images, photos/train/<class>/*,
  --data.root=photos                 and where they are
  --data.batch_size=128              images a step and process (64)
  --freeze.unfreeze_epoch=3          the first epoch that trains everything (5); 0: from the beginning
  --model.lr=3e-4                    learning rate until then (1e-3),
  --freeze.unfrozen_lr=5e-5          and from then on (1e-4)
  --find_lr                          trains nothing, and suggests both rates
  --trainer.max_epochs=10            epochs (40)
  --trainer.devices=4                GPUs (all there are)
  --resume=lightning_logs/version_0  continue a run that was stopped

Recipes: --config configs/fast.yaml (minutes), configs/accurate.yaml (one GPU), configs/scratch.yaml.

all """


LONGEST = 400  # letters of a complaint


class Parser(LightningArgumentParser):
    """Lightning's parser, whose complaints are sentences, without a page of usage before them."""

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """The options people use, then all of them."""
        text = super().format_help(*args, **kwargs)
        # Without the page of usage. The help of one class (--data.help) comes from a parser of this kind too.
        return HELP + text[text.index("options:") :] if "--resume" in text else text

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise a `UserError`, with near names for an unknown option."""
        found = re.search(r"unrecognized arguments: (--\S+)", message, re.IGNORECASE)
        if found:
            known = [option for action in self._actions for option in action.option_strings]
            near = difflib.get_close_matches(found[1].split("=")[0], known, n=3, cutoff=0.5)
            message = f"There is no option {found[1]}" + (f": did you mean {', '.join(near)}?" if near else ".")
        elif link := re.search(r"Call to compute_fn of link .* failed: (.*)", message):
            message = link[1]
        elif denied := re.search(r"Importing '(\S+)' is not allowed", message):
            message = (
                f"The run's configuration names {denied[1]}, which is not of this project or Lightning and would be "
                f"imported: if you trust it, name it on the command line too."
            )
        elif data := re.search(r'Parser key "data".*Expected a dot import path string: (\S+)', message, re.DOTALL):
            names = ", ".join(sorted(kind.__name__ for kind in ImageDataModule.__subclasses__()))
            message = f"There is no data module {data[1]}: take one of {names}."
        elif given := re.search(r"(?:Got|Given) value: (.*)", message):
            message = taken(message[: given.start()], given[1])
        raise UserError(f"{textwrap.shorten(message, LONGEST)} (All options: --help)")


class FitCLI(LightningCLI):
    """`LightningCLI` for `TransferClassifier` and the data modules, without subcommands."""

    def __init__(self, args: Sequence[str]) -> None:
        console.hush()
        super().__init__(
            TransferClassifier,
            ImageDataModule,
            runs.SaveConfig,
            subclass_mode_data=True,
            seed_everything_default=0,
            trainer_defaults={"max_epochs": 40, "log_every_n_steps": 10, "enable_model_summary": False},
            save_config_kwargs={"save_to_log_dir": False},  # which is not done in one move
            load_from_checkpoint_support=False,  # the classes record their own options
            auto_configure_optimizers=False,
            parser_class=Parser,
            run=False,
            args=list(args),
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The callback's options, the two ways to continue, the search for a rate, and what links the classes."""
        parser.add_lightning_class_args(BackboneFreeze, "freeze")
        parser.add_lightning_class_args(Report, "report")
        parser.add_argument(
            "--ckpt_path", type=str | None, default=None, help="Checkpoint to continue from, in a new run."
        )
        parser.add_argument("--resume", type=str | None, default=None, help="Folder of a run to continue in place.")
        parser.add_argument(
            "--find_lr", action=ActionYesNo, nargs="?", help="Find learning rates to begin with, and train nothing."
        )
        parser.set_defaults({"data": {"class_path": "cifar_transfer.CIFAR10DataModule"}})
        parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=_integer_seed)
        parser.link_arguments("data.class_names", "model.class_names", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Put the configuration of a run to resume before the options, so that these override it."""
        resume = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        resume.add_argument("--resume")
        resume.error = parser.error  # type: ignore[method-assign]
        run = resume.parse_known_args(args)[0].resume
        if run:
            config = Path(run, runs.CONFIG)
            if not config.is_file():
                raise UserError(
                    f"--resume {run}: there is no {config}; name the folder of a run, say {LOGS}/version_0."
                )
            runs.import_nothing_else(args)
            args = ["--config", str(config), *args]
        self.config = parser.parse_args(args)
        self.job = runs.job_folder(Path(self.config.trainer.default_root_dir or "."))
        if self.job and not self.config.find_lr and (self.job / runs.CONFIG).is_file():
            run = self.config.resume = str(self.job)  # requeued, with the same options
        if run:
            state = runs.newest_state(Path(run))
            self.config.ckpt_path = str(state) if state else None  # killed in its first epoch: from the beginning

    def before_instantiate_classes(self) -> None:
        """A checkpoint holds all weights, so none are fetched, and what the words for size and statistics meant."""
        self._asked: dict[str, Any] = {}
        if self.config.find_lr:
            if self.config.ckpt_path:
                raise UserError("--find_lr looks at a run that begins: leave out --resume and --ckpt_path.")
            self.config.model.train_sizes = None  # at the last size, for another in the middle would bend the curve
        if path := self.config.ckpt_path:
            saved = read_checkpoint(path)["hyper_parameters"]
            instead: dict[str, Any] = {"weights": "none"}
            for name, word in (("image_size", "native"), ("normalize", "weights")):
                if self.config.model[name] == word:
                    instead[name] = saved[name]
            for name, value in instead.items():
                self._asked[name], self.config.model[name] = self.config.model[name], value

    def instantiate_classes(self) -> None:
        """As Lightning's, after which the options recorded are those given."""
        try:
            super().instantiate_classes()
        except (ValueError, TypeError) as error:  # jsonargparse's, around one of ours, or the Trainer's
            ours: BaseException | None = error
            while ours is not None and not isinstance(ours, UserError):
                ours = ours.__cause__ or ours.__context__
            raise UserError(str(ours) if ours else textwrap.shorten(str(error), LONGEST)) from None
        for name, value in self._asked.items():
            self.config.model[name] = value
        if self._asked:
            self.model.hparams["weights"] = self._asked["weights"]

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add logger, checkpoints and terminal unless the options name others or want none."""
        options = self.config_init.trainer
        if options.limit_val_batches == 0:
            raise UserError(
                "limit_val_batches=0: the schedule and the choice of the checkpoint need validation images."
            )
        if options.max_epochs is None and options.max_steps == -1 and options.max_time is None:
            raise UserError("max_epochs is null, which Lightning takes for 1000: give a number, or -1 for no end.")
        check("accumulate_grad_batches", options.accumulate_grad_batches, lambda n: n >= 1, "1 batch or more")
        if options.gradient_clip_val is not None:
            check("gradient_clip_val", options.gradient_clip_val, lambda x: 0 <= x < math.inf, "0 (off) or more")
        if options.default_root_dir:
            _require_writable(Path(options.default_root_dir))
        callbacks: list[Any] = [Guard()]
        self.predictions: CollectPredictions | None = None
        if self.config_init.report.figures and not options.fast_dev_run:
            self.predictions = CollectPredictions(PROJECTED if self.config_init.report.projector else 0)
            callbacks.append(self.predictions)
        self.best = runs.RunCheckpoint("best", "val/acc", in_place=bool(self.config.resume))
        last = None
        if options.enable_checkpointing is not False and not options.fast_dev_run:
            last = runs.RunCheckpoint("last", in_place=bool(self.config.resume))
            callbacks += [self.best, last]
        self.interrupt = Interrupt(last)
        callbacks.append(self.interrupt)
        if options.enable_progress_bar is not False and sys.stdout.isatty():
            callbacks.append(TQDMProgressBar(leave=False))
        else:
            kwargs["enable_progress_bar"] = False
        if options.benchmark is None and not options.deterministic:
            kwargs["benchmark"] = True  # cuDNN's; there are few sizes of batches
        if torch.cuda.is_available():
            torch.set_float32_matmul_precision("high")  # TF32, as cuDNN's convolutions have by default
        if self.config.find_lr:
            _require_writable(Path(options.default_root_dir or "."))
            self.save_config_callback = None
            return super().instantiate_trainer(**kwargs | find_lr.settings())
        if self.config.model.schedule != "plateau" and options.logger is not False and not options.fast_dev_run:
            callbacks.append(LearningRateMonitor("step"))  # a plateau changes it between epochs only
        if options.logger is None or options.logger is True:
            logger = kwargs["logger"] = self._logger(options.default_root_dir or ".")
            if self.job:
                kwargs["default_root_dir"] = logger.log_dir  # for Lightning's own checkpoint, which is no other job's
        plugins = options.plugins or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*plugins, runs.WholeFiles()]
        self.trainer_defaults["callbacks"] = callbacks
        return super().instantiate_trainer(**kwargs)

    def _logger(self, root: str) -> runs.Board:
        if not (run := self.config.resume):
            logs = Path(root, LOGS)
            _require_writable(logs)
            # Absolute, as when the run is resumed: a ModelCheckpoint that finds another path forgets its best score.
            return runs.Board(str(Path(root).resolve()), LOGS, self.job.name if self.job else None)
        folder = Path(run).resolve()
        _require_writable(folder)
        self._trim(folder)
        return runs.Board(str(folder.parent), "", folder.name)

    @rank_zero_only
    def _trim(self, folder: Path) -> None:
        epoch = step = 0
        if self.config.ckpt_path:
            checkpoint = torch.load(self.config.ckpt_path, "cpu", weights_only=True, mmap=True)
            # Of one that was written within an epoch, this epoch's scores are still to come.
            over = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["is_last_batch"]
            epoch, step = checkpoint["epoch"] + over, checkpoint["global_step"]
        trim_events(folder, epoch, step)


def _integer_seed(seed: bool | int) -> int:
    if isinstance(seed, bool):
        raise UserError(
            f"seed_everything is {str(seed).lower()}: give a number, for data and augmentation follow from it."
        )
    check("seed_everything", seed, lambda n: 0 <= n < 2**32, "a number from 0 to 4294967295")
    return seed


def _require_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror}): name another place with --trainer.default_root_dir=FOLDER."
        ) from None
