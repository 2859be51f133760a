"""Phases of a run: which parameters begin to train in which, and which modules rest until then."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lightning import LightningModule
from torch import nn

from cifar_transfer.base.console import counted
from cifar_transfer.base.errors import UserError, check
from cifar_transfer.network.stages import HEAD, stages
from cifar_transfer.training.schedule import MAX_LEARNING_RATE

EVERYTHING = "all"
GRADUAL = "gradual"
RATE = f"a positive rate up to {MAX_LEARNING_RATE}, or null to leave the rate as it is"
DROPOUTS = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)


@dataclass(frozen=True)
class Phase:
    """A part of a run: what trains from its beginning on, beside what trains already.

    The first begins with the run; each other has an `epoch` or a `patience`.

    Args:
        train: Stages of the network, such as "head", "layer4", "stem" (`python -m cifar_transfer backbones --detail
            NAME` lists them), "all", or regular expressions that match parameters' names from their start.
        epoch: It begins after so many epochs of the run.
        patience: It begins after so many epochs of the phase before it without a better figure.
        lr: Learning rate from then on of all parameter groups but one named "head", times their `lr_scale`; of a
            schedule that rises, its highest.
        from_best: Begin with the weights of the best checkpoint so far.

    Raises:
        UserError: Values out of range.
    """

    train: list[str]
    epoch: int | None = None
    patience: int | None = None
    lr: float | None = None
    from_best: bool = False

    def __post_init__(self) -> None:
        check("epoch", self.epoch, lambda n: n is None or n >= 0, "0 or a later one")
        check("patience", self.patience, lambda n: n is None or n >= 1, "1 epoch or more")
        check("lr", self.lr, lambda x: x is None or 0 < x <= MAX_LEARNING_RATE, RATE)
        if not self.train:
            raise UserError(f"A phase trains something: {self}.")
        check_patterns("train", self.train)


def span(later: Sequence[Phase], epoch: int, max_epochs: int | None) -> str:
    """The epochs of a phase that is followed by these, from `epoch` on (of 0): "Epochs 6 to 40"."""
    first, last = counted(epoch), max_epochs if max_epochs and max_epochs > 0 else math.inf
    end = later[0].epoch if later else last  # counted from 1, the last epoch before it
    if end is None or min(end, last) == math.inf:
        return f"From epoch {first}"
    return f"Epoch {first}" if min(end, last) == first else f"Epochs {first} to {min(end, last)}"


def named(begun: Sequence[Phase], first: bool) -> str:
    """What trains in the first phase or begins to train in later ones, and at which rate, in a few words."""
    names = [name for phase in begun for name in phase.train]
    what = f"only {', '.join(names)}" if first else f"{', '.join(names)} unfrozen"
    if EVERYTHING in names:
        what = "everything"
    elif first and (names == [HEAD] or names[0].startswith("(?!")):  # of `frozen`
        what = "backbone frozen" if names == [HEAD] else "partly frozen"
    return what + "".join(f" at rate {phase.lr:g}" for phase in begun if phase.lr)


def check_patterns(name: str, patterns: Sequence[str]) -> None:
    """Refuse, by a `UserError`, what is no regular expression."""
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(
                f"{name} has {pattern!r}, which is not a regular expression ({error})."
            ) from None


def check_begins(phases: Sequence[Phase]) -> None:
    """Refuse, by a `UserError`, phases of which it is not clear when they begin."""
    for number, phase in enumerate(phases):
        begins = [value for value in (phase.epoch, phase.patience) if value is not None]
        if number == 0 and phase != Phase(phase.train):
            raise UserError(
                f"The first phase begins with the run, at the optimizer's rate: give it train alone: {phase}."
            )
        if number and len(begins) != 1:
            raise UserError(
                f"A phase after the first begins by an epoch or by a patience: {phase}."
            )


def check_order(phases: Sequence[Phase]) -> None:
    """Refuse, by a `UserError`, a phase that would begin after a later one."""
    epochs = [phase.epoch for phase in phases if phase.epoch is not None]
    if epochs != sorted(epochs):
        raise UserError(
            f"phases come in the order in which they begin, not at the epochs {epochs}."
        )


def own_stages(module: LightningModule) -> dict[str, list[str]]:
    """The stages of a module's `network`, or of itself: names of parameters and buffers in it, from stem to head.

    Raises:
        UserError: A name in its `heads` that no submodule has.
    """
    heads = getattr(module, "heads", ())
    heads = (
        [head for head in heads if isinstance(head, str)]
        if isinstance(heads, list | tuple | set)
        else []
    )
    known = {name for name, _ in module.named_modules()}
    network = getattr(module, "network", None)
    prefix = next((f"{name}." for name, child in module.named_modules() if child is network), "")
    if not isinstance(network, nn.Module) or not known.issuperset(prefix + head for head in heads):
        network, prefix = module, ""
    if unknown := [head for head in heads if prefix + head not in known]:
        raise UserError(
            f"{type(module).__name__}.heads names {unknown[0]!r}, which is none of its submodules."
        )
    return {
        stage: [prefix + name for name in names] for stage, names in stages(network, heads).items()
    }


def planned(
    module: LightningModule,
    stages: dict[str, list[str]],
    given: Sequence[Phase] | Sequence[str] | None,
    epoch: int,
    lr: float | None,
) -> list[Phase]:
    """All phases of a run.

    Args:
        module: Whose parameters.
        stages: As of `own_stages`.
        given: The phases, or "gradual", or expressions of what is frozen until `epoch`; None: all but the head is.
        epoch: When the second phase of two begins; 0: there is one.
        lr: The rate from then on.

    Raises:
        UserError: It is not known what is to be frozen.
    """
    if given and isinstance(given, list) and isinstance(given[0], Phase):
        return given
    if given != GRADUAL and epoch == 0:
        return [Phase([EVERYTHING])]
    first = HEAD
    if given and given != GRADUAL:
        first = f"(?!{'|'.join(f'(?:{pattern})' for pattern in given)})"
        if all(re.match(first, name) for name, _ in module.named_parameters()):
            raise UserError(
                f"No parameter's name begins with any of {given}: see the module's named_parameters()."
            )
    elif HEAD not in stages:
        raise UserError(
            f"{type(module).__name__} names no head, so all of it would be frozen: give BackboneFreeze the names of "
            f"what to freeze, frozen=[...], or the module an attribute `heads`, the names of its layers."
        )
    if given != GRADUAL:
        return [Phase([first]), Phase([EVERYTHING], epoch=epoch, lr=lr)]
    later = [[stage] for stage in reversed(stages) if stage != HEAD]
    later[-1] = [EVERYTHING]  # also what is in no stage, if there is a module around the network
    return [
        Phase([HEAD]),
        *(
            Phase(each, number, lr=lr if number == 1 else None)
            for number, each in enumerate(later, 1)
        ),
    ]


def begins(
    module: nn.Module, phases: Sequence[Sequence[str]], stages: Mapping[str, list[str]]
) -> dict[str, int]:
    """In which phase each parameter and buffer begins to train, by name; `len(phases)` if in none.

    One with several names (tied weights) begins with the first of them.

    Args:
        module: Whose parameters and buffers.
        phases: What each trains, as `Phase.train` names it.
        stages: As of `own_stages`.

    Raises:
        UserError: A name that is no stage and matches nothing.
    """
    state = dict(
        [
            *module.named_parameters(remove_duplicate=False),
            *module.named_buffers(remove_duplicate=False),
        ]
    )
    first: dict[int, int] = {}  # by the identity of the tensor
    for number, train in enumerate(phases):
        for what in train:
            chosen = state if what == EVERYTHING else stages.get(what, ())
            chosen = chosen or [name for name in state if re.match(what, name)]
            if not chosen:
                known = ", ".join([*stages, EVERYTHING])
                raise UserError(
                    f"{what!r} is no stage ({known}), and no parameter's name begins with it."
                )
            for name in chosen:
                first.setdefault(id(state[name]), number)
    return {name: first.get(id(tensor), len(phases)) for name, tensor in state.items()}


def resting(module: nn.Module, begins: Mapping[str, int], phase: int) -> set[nn.Module]:
    """The modules that are frozen in a phase, and therefore in eval mode.

    These are all whose parameters and buffers are frozen, with everything in them; and dropouts and others without
    state that stand before a frozen module. Other modules that `module` has itself, such as an augmentation, are not
    known to be part of the network.
    """
    found: set[nn.Module] = set()

    def visit(prefix: str, module: nn.Module) -> bool | None:
        """Whether all of its state is frozen; None if it has none."""
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        known = [begins.get(prefix + name, 0) > phase for name, _ in own]
        children = [
            (child, visit(f"{prefix}{name}.", child)) for name, child in module.named_children()
        ]
        following: bool | None = None
        for child, frozen in reversed(children):
            if frozen is None and following and (prefix or isinstance(child, DROPOUTS)):
                found.update(child.modules())
            following = following if frozen is None else frozen
        known += [frozen for _, frozen in children if frozen is not None]
        if known and all(known):
            found.update(module.modules())
        return all(known) if known else None

    visit("", module)
    return found


def never_train(
    module: nn.Module,
    begins: Mapping[str, int],
    phases: int,
    ours: Iterable[nn.Parameter],
    optimized: Iterable[nn.Parameter],
) -> list[str]:
    """A sentence for each reason why parameters that are frozen at first never train.

    Args:
        module: Whose parameters.
        begins: As of the function of that name.
        phases: Their number.
        ours: Those that were trainable before the fit.
        optimized: Those that an optimizer has.
    """
    trainable, known = (
        {id(parameter) for parameter in ours},
        {id(parameter) for parameter in optimized},
    )
    found: dict[str, list[str]] = {}
    for name, parameter in module.named_parameters():
        if begins[name] == phases:
            found.setdefault("stay frozen, because no phase trains them", []).append(name)
        elif begins[name] and id(parameter) not in trainable:
            found.setdefault("stay frozen, because the module itself has fixed them", []).append(
                name
            )
        elif begins[name] and id(parameter) not in known:
            found.setdefault("never train, because no optimizer has them", []).append(name)
    return [
        f"{len(names)} tensors of parameters, such as {names[0]}, {why}."
        for why, names in found.items()
    ]
