"""Train, validate, checkpoint, test and report.

    python -m cifar_transfer.fit [--config FILE] [options]

Without options it is the whole recipe: ResNet18 with ImageNet weights on CIFAR-10, 5 epochs with a frozen backbone and
35 without, then the test with the best checkpoint. What people change first:

  --config=fast                a recipe: fast, cpu (minutes), accurate (one
                               GPU), scratch (no pretraining); or a file
  --data=ImageFolderDataModule your own images, photos/train/<class>/*,
  --data.root=photos           and where they are
  --data.batch_size=128        images a step and process (64)
  --model.backbone=resnet50    another network, see the command backbones
  --model.weights=FILE         its weights: a file, a name, or none
  --model.image_size=64        pixels that images are resized to
  --model.lr=3e-4              learning rate (1e-3) until the unfreezing
  --freeze.unfreeze_epoch=3    epochs with a frozen backbone (5); 0: none
  --trainer.max_epochs=10      epochs (40)
  --resume=RUN                 continue a run that was stopped, by its folder
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from lightning import Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.distributed import DistError

from cifar_transfer.base.console import counted, duration, say, styled
from cifar_transfer.base.errors import UserError, disk_fault
from cifar_transfer.base.files import LOGS
from cifar_transfer.base.text import program
from cifar_transfer.cli.fit_cli import FitCLI
from cifar_transfer.data.shapes import ShapesDataModule
from cifar_transfer.training.checkpoint_file import newest_checkpoint
from cifar_transfer.training.collect_predictions import CollectPredictions
from cifar_transfer.training.evaluation import evaluate_checkpoint
from cifar_transfer.training.final_report import draw_final, log_final, write_result
from cifar_transfer.training.interrupt import end_with_the_first

BFLOAT16 = ("avx512_bf16", "amx_bf16")  # of the processor itself; others emulate it slowly
SCORES = {"acc": "accuracy", "balanced_accuracy": "balanced accuracy", "macro_f1": "macro F1"}


class Outcome(NamedTuple):
    """What a run came to."""

    # Of `best/val_acc`, where there are test images `best/test_acc`, where classes are unequal `best/val_macro_f1`, ...
    scores: dict[str, float]  # shares of 1
    best: Path  # the checkpoint with the best validation accuracy


def fit(args: Sequence[str]) -> Outcome | None:
    """Run the job that options, as on the command line, describe.

    Returns:
        The outcome, or None after `fast_dev_run`, which keeps nothing.

    Raises:
        UserError: A mistake in the options, the data or the checkpoint.
    """
    end_with_the_first()
    cli = FitCLI(args)
    try:
        return _job(cli)
    except UserError as error:
        raise cli.named_as_options(error) from error
    except (OSError, ValueError) as error:  # Lightning's of a curve that cannot be written
        if (fault := disk_fault(error)) is None:
            raise
        raise UserError(f"{fault} {_advice(cli)}") from error
    except RuntimeError as error:
        # Of NCCL and of gloo, which has no class of its own.
        if not isinstance(error, DistError) and "gloo" not in str(error):
            raise
        gone = "Another process of this run is gone; if it said nothing above, it was killed."
        raise UserError(f"{gone} {_advice(cli)}") from error
    finally:
        cli.folder.release()
        # A thread of gloo that frees a tensor while the interpreter ends aborts the process. This waits for the thread.
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _job(cli: FitCLI) -> Outcome | None:
    trainer, model, data = cli.trainer, cli.model, cli.datamodule
    _train(cli)
    if (best := _best(cli)) is None:
        return None
    options = cli.config.report
    scores: dict[str, float] = {}
    tested = "test" in data.images and trainer.limit_test_batches != 0
    for split in ("val", "test") if tested else ("val",):
        collect = CollectPredictions() if options.figures else None
        found = evaluate_checkpoint(trainer, best, data, split, [collect] if collect else None)
        scores |= {
            f"best/{name.replace('/', '_')}": found[name]
            for name in found
            if not name.endswith("loss")
        }
    log_final(trainer, {**data.hparams, **model.hparams}, scores, found if split == "test" else {})
    result = write_result(trainer, model, scores)
    if collect:
        draw_final(trainer, split, collect.predictions)
    run, checkpoint = _here(trainer.log_dir), _here(best)
    lines = {}
    for name, value in scores.items():
        split, _, score = name.removeprefix("best/").partition("_")
        lines[f"{split} {SCORES[score]}"] = styled(f"{value:.2%}", 32)
    epochs, epoch = (
        result["epochs"],
        counted(torch.load(best, "cpu", weights_only=True, mmap=True)["epoch"]),
    )
    newest = (
        run.parent == Path(LOGS) and newest_checkpoint() == checkpoint
    )  # which predict takes by itself
    speed = f"{result['images_per_second']:.0f} images/s"
    lines |= {
        "checkpoint": f"the best, of epoch {min(epoch, epochs)}",  # the last weights are saved after the epoch
        "training": f"{epochs} epoch{'s' * (epochs > 1)} in {duration(result['seconds'])}, {speed}",
        "network": f"{model.classifier.backbone}, {result['parameters']:,} parameters",
        "run": str(run),
        "look at it": f"tensorboard --logdir {run.parent}",
        "predict": f"{program('predict')} IMAGE{'' if newest else f' --ckpt {checkpoint}'}",
        "and more": program("").rstrip(" ."),
    }
    width = max(map(len, lines))
    say(trainer, "\n".join(["", *(f"{name:<{width}}  {text}" for name, text in lines.items())]))
    return Outcome(scores, checkpoint)


def _best(cli: FitCLI) -> Path | None:
    """The best checkpoint of this run; None if it keeps none or has not trained."""
    best = cli.best.path
    if best is None or cli.trainer.global_step == 0:
        return None
    if cli.best.best_model_path != str(best):
        say(
            cli.trainer,
            f"No validation took place while training: {best.name} keeps the last weights.",
        )
        cli.trainer.save_checkpoint(best)
    return best


def _train(cli: FitCLI) -> None:
    trainer, stop = cli.trainer, cli.interrupt
    if slow_precision(trainer) and not isinstance(
        cli.datamodule, ShapesDataModule
    ):  # which takes no time worth a word
        say(
            trainer,
            "This processor computes in bfloat16: --trainer.precision=bf16-mixed takes less time.",
        )
    try:
        trainer.fit(cli.model, cli.datamodule, ckpt_path=cli.config.ckpt_path)
    except SystemExit:
        if not stop.asked:
            raise
    if stop.asked:
        say(trainer, f"Stopped. {_advice(cli)}")
        # The others end without a word, lest they seem to have failed to the one that started them.
        raise SystemExit(stop.status if trainer.is_global_zero else 0) from None
    if trainer.received_sigterm:  # when the training was over
        raise SIGTERMException


def slow_precision(trainer: Trainer) -> bool:
    """Whether a run computes in float32 on a processor that has bfloat16 of its own."""
    has: dict[str, bool] = getattr(
        torch.cpu, "get_capabilities", dict
    )()  # which older versions do not know
    on_it = trainer.strategy.root_device.type == "cpu" and trainer.precision == "32-true"
    return on_it and any(has.get(name) for name in BFLOAT16)


def _advice(cli: FitCLI) -> str:
    if not cli.folder.started:
        return "It had not begun to train: start it again."
    logger = cli.trainer.logger  # `trainer.log_dir` would ask the other processes
    return f"Continue with: {program('fit')} --resume {_here(logger.log_dir if logger else '.')}"


def _here(path: str | Path | None) -> Path:
    return Path(os.path.relpath(path or "."))


def main(args: Sequence[str]) -> None:
    """Run the job that the options describe."""
    fit(args)
