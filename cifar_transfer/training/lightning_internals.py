"""What Lightning, torch and jsonargparse do not promise, and this project needs: all of it is here.

Each function says why it is needed and since which version it was seen to work. Each has a test in
`tests/test_lightning_internals.py` that fails when the library changes; the lower bounds in
`pyproject.toml` follow from them.
"""

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn


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
