"""What Lightning, torch and jsonargparse do not promise, and this project needs: all of it is here.

Each function says why it is needed and since which version it was seen to work. Each has a test in
`tests/test_lightning_internals.py` that fails when the library changes; the lower bounds in
`pyproject.toml` follow from them.
"""

import math
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers.logger import DummyExperiment
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.trainer.states import TrainerFn
from torch.distributed import DistError
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from cifar_transfer.data.splits import REQUEUED


def trainer_of(module: LightningModule) -> Trainer | None:
    """Return the trainer of a module, or None while it has none.

    `LightningModule.trainer` raises where there is none, and hooks are also called by hand and by
    `load_from_checkpoint`. Since Lightning 2.0.
    """
    return module._trainer


def is_fitting(module: LightningModule) -> bool:
    """Return whether a module is attached to a trainer that runs `fit`, also while it validates.

    `Trainer.training` is False during the validation within a fit. Since Lightning 2.0.
    """
    trainer = trainer_of(module)
    return trainer is not None and trainer.state.fn == TrainerFn.FITTING


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """Return the callbacks of a trainer.

    A connector sets the attribute, which the class does not declare. Since Lightning 2.0.
    """
    return trainer.callbacks  # type: ignore[attr-defined]


def data_of(trainer: Trainer) -> Any:
    """Return the data module of a trainer, or None if it was given loaders.

    A connector sets the attribute, which the class does not declare. Since Lightning 2.0.
    """
    return trainer.datamodule  # type: ignore[attr-defined]


def is_trial(trainer: Trainer) -> bool:
    """Return whether a trainer only tries the code with a few batches, as `fast_dev_run` asks.

    A connector sets the attribute, which the class does not declare. Since Lightning 2.0.
    """
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def profiler_of(trainer: Trainer) -> Profiler:
    """Return the profiler of a trainer; without one it has one that measures nothing.

    A connector sets the attribute, which the class does not declare. Since Lightning 2.0.
    """
    return trainer.profiler  # type: ignore[attr-defined]


def log_interval(trainer: Trainer) -> int:
    """Return every how many steps a trainer logs; 0: never.

    A connector sets the attribute, which the class does not declare. Since Lightning 2.0.
    """
    return trainer.log_every_n_steps  # type: ignore[attr-defined]


def set_log_interval(trainer: Trainer, steps: int) -> None:
    """Have a trainer log every so many steps from now on.

    The argument `log_every_n_steps` is for good; the loops read the attribute in each step. Since
    Lightning 2.0.
    """
    trainer.log_every_n_steps = steps  # type: ignore[attr-defined]


def count_training_batches(trainer: Trainer) -> float:
    """Return the number of batches of an epoch of training; infinite where the data do not say.

    `Trainer.num_training_batches` is infinite until the fit loop has set up the data, which it does
    after `configure_optimizers`, unless `Trainer.estimated_stepping_batches` needed them for an end
    given by `max_epochs`. Since Lightning 2.0.
    """
    if trainer.num_training_batches == math.inf:
        trainer.fit_loop.setup_data()
    return trainer.num_training_batches


def wrap_again(trainer: Trainer, module: LightningModule) -> None:
    """Wrap a module anew in `DistributedDataParallel`, if a trainer has wrapped it before.

    The wrapper registers the parameters that require a gradient when it is made, and averages the
    gradients of no others (Lightning #20340). Nothing public makes another one. The old wrapper is
    freed, and with it its hooks on the gradients. Since Lightning 2.0.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, DDPStrategy):
        return
    if not isinstance(strategy.model, DistributedDataParallel):
        return
    strategy.model = module
    strategy.configure_ddp()


def uncompiled(module: Any) -> Any:
    """Return the module that `torch.compile(module)` wraps, and any other one as it is.

    The wrapper keeps it in `_orig_mod`, which is part of the names of its parameters. Since torch
    2.0.
    """
    return getattr(module, "_orig_mod", module)


def schedulers_within(scheduler: Any) -> Iterator[Any]:
    """Iterate over a scheduler and over those that it is made of.

    `SequentialLR` and `ChainedScheduler` keep them in `_schedulers` and have no public name for
    them. Since torch 2.0.
    """
    yield scheduler
    for part in getattr(scheduler, "_schedulers", ()):
        yield from schedulers_within(part)


def reset_plateau(plateau: ReduceLROnPlateau) -> None:
    """Have a `ReduceLROnPlateau` forget the figures that it has seen.

    Its own `_reset` is private; the attributes are those of its state dict. Since torch 2.0.
    """
    plateau.best = plateau.mode_worse
    plateau.num_bad_epochs = 0
    plateau.cooldown_counter = 0


def complete_momentum(optimizer: Optimizer) -> None:
    """Give parameters of fused SGD a momentum of zero where they have none.

    Parameters that were frozen have none, and the fused kernel fails where some have one and others
    have not. Since torch 2.4.
    """
    for group in optimizer.param_groups:
        if group.get("fused") and group.get("momentum"):
            for parameter in group["params"]:
                state = optimizer.state[parameter]
                state.setdefault("momentum_buffer", torch.zeros_like(parameter))


def attach(trainer: Trainer, module: LightningModule, data: LightningDataModule) -> None:
    """Have a module find its trainer and data as in a run, without running it.

    Only the functions of the trainer (`fit`, `test`, ...) do so. Since Lightning 2.0.
    """
    trainer.datamodule = data  # type: ignore[attr-defined]
    module.trainer = trainer


def save_attached(trainer: Trainer, module: LightningModule, path: Path) -> None:
    """Save a checkpoint, without the state of a run, of a module that is attached.

    `Trainer.save_checkpoint` saves the module that ran last, which is the one that the strategy is
    connected to. Since Lightning 2.0.
    """
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path, weights_only=True)


def has_temporary_processes(trainer: Trainer) -> bool:
    """Return whether processes of a trainer end with each of its functions, as with `ddp_spawn`.

    What they have computed is lost with them, unless it is in a file. Since Lightning 2.0.
    """
    return isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)


def move_profiler(trainer: Trainer, source: Path, target: Path) -> None:
    """Have a profiler that would write into one folder write into another one.

    The Trainer sets its profiler up before any callback, with the folder that `log_dir` names at
    that time, and no later call to `setup` changes it. Since Lightning 2.0.
    """
    profiler = profiler_of(trainer)
    if profiler.dirpath == str(source):
        profiler.dirpath = str(target)


def is_temporary(checkpoint: str | Path | None) -> bool:
    """Return whether a checkpoint is one that Lightning's Tuner writes, reads and removes.

    It puts a module back to where it was before sizes of batches or learning rates were tried. Only
    the name of the file tells it from one that the user has named. Since Lightning 2.0.
    """
    if checkpoint is None:
        return False
    return Path(checkpoint).name.startswith((".scale_batch_size_", ".lr_find_"))


def ended_epoch(checkpoint: Mapping[str, Any]) -> bool:
    """Return whether the epoch of a checkpoint was over when it was written.

    Lightning stores the state of its loops, whose form it does not document. Since Lightning 2.0.
    """
    return checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["is_last_batch"]


def leave_epoch_open(checkpoint: Mapping[str, Any]) -> None:
    """Have a run that continues from a checkpoint within an epoch go on with that epoch.

    If `max_steps`, `max_time` or a callback ends an epoch early, Lightning counts the epoch as
    processed, and a run that continues would begin with the next one. Since Lightning 2.0.
    """
    epoch_progress = checkpoint["loops"]["fit_loop"]["epoch_progress"]
    for counts in (epoch_progress["total"], epoch_progress["current"]):
        counts["processed"] = counts["completed"]


def moved_checkpoints(state: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """Return the state of a `ModelCheckpoint` whose files are in another folder now.

    The callback compares the folder in its state with its own as text. If they differ it forgets
    the best score, and then replaces the best checkpoint by a worse one. Since Lightning 2.0.
    """

    def moved(path: str) -> str:
        if not path:  # there is no such checkpoint
            return path
        return os.path.join(folder, os.path.basename(path))

    state = dict(state)
    state["dirpath"] = folder
    for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
        state[key] = moved(state[key])
    state["best_k_models"] = {moved(path): score for path, score in state["best_k_models"].items()}
    return state


def silent_experiment() -> Any:
    """Return the experiment of a logger that takes all calls and writes nothing.

    Lightning uses it on ranks other than the first. It is not among the documented loggers. Since
    Lightning 2.0.
    """
    return DummyExperiment()


def has_gradient_scaler(trainer: Trainer) -> bool:
    """Return whether losses are scaled in half precision, and steps that overflow are skipped.

    The scaler is an attribute of one plugin for precision, and not of the others. Since Lightning
    2.0.
    """
    return getattr(trainer.precision_plugin, "scaler", None) is not None


def requeue_handler() -> Callable[[int, FrameType | None], Any] | None:
    """Return the handler with which Lightning requeues this SLURM job; None outside of SLURM.

    Lightning registers it for the signal that SLURM sends before the end of a job, without a name
    for it. Since Lightning 2.0.
    """
    if not SLURMEnvironment.detect():
        return None
    handler = signal.getsignal(signal.SIGUSR1)
    return handler if callable(handler) else None


def requeued_checkpoint(root: Path) -> Path | None:
    """Return the checkpoint with which Lightning goes on in a SLURM job, or None.

    It takes the newest that is in `default_root_dir`, and has no public name for it. Since
    Lightning 2.0.
    """
    if not SLURMEnvironment.detect():
        return None
    newest: Path | None = None
    newest_number = -1
    for path in root.glob(f"{REQUEUED}*.ckpt"):
        number = path.stem.removeprefix(REQUEUED)
        if number.isdecimal() and int(number) > newest_number:
            newest = path
            newest_number = int(number)
    return newest


@contextmanager
def without_requeued_state(trainer: Trainer) -> Iterator[None]:
    """Have a trainer evaluate a network with the weights that it has.

    In a SLURM job Lightning loads the state that a requeued fit has left in `default_root_dir`,
    `hpc_ckpt_1.ckpt`, into every network that is tested, validated or predicted with, unless the
    user manages `Trainer.ckpt_path`. Since Lightning 2.0.
    """
    connector = trainer._checkpoint_connector
    user_managed = connector._user_managed
    ckpt_path = connector._ckpt_path
    connector._user_managed = True
    connector._ckpt_path = None
    try:
        yield
    finally:
        connector._user_managed = user_managed
        connector._ckpt_path = ckpt_path


def is_lost_process(error: BaseException) -> bool:
    """Return whether an error says that another process of the run is gone.

    NCCL has a class for it. Gloo raises a RuntimeError, which only its text tells from others.
    Since torch 2.0.
    """
    return isinstance(error, DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )
