"""Phases of a run: the dataclass `Phase`, and functions over names of parameters.

`BackboneFreeze` (freeze.py) decides which phase a run is in. Nothing here changes a module.
"""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor, nn

from cifar_transfer.base.console import counted
from cifar_transfer.base.errors import UserError, check
from cifar_transfer.base.primitives import as_primitive
from cifar_transfer.network.stages import HEAD, find_stages
from cifar_transfer.training import lightning_internals
from cifar_transfer.training.schedule import MAX_LEARNING_RATE

EVERYTHING = "all"
ALL_BUT_FROZEN = "all but frozen"  # first phase of `BackboneFreeze(frozen=[...])`
RATE = f"a positive rate up to {MAX_LEARNING_RATE}, or null to leave the rate as it is"


@dataclass(frozen=True)
class Phase:
    """A part of a run: what begins to train with it, when it begins, and at which learning rate.

    What trains already goes on training. The first phase begins with the run; each later one has
    an `epoch` or a `patience`.

    Args:
        train: Stages of the network, such as "head", "layer4", "stem" (`python -m cifar_transfer
            backbones --detail NAME` lists them), "all", or regular expressions that match the names
            of parameters from their start; a text is a list of one. Tied weights train as soon as
            one of their names does.
        epoch: The phase begins after so many epochs of the run.
        patience: The phase begins after so many epochs of the phase before without a better value
            of `BackboneFreeze.monitor`.
        lr: Learning rate from then on of all parameter groups but one named "head", times their
            `lr_scale`; if a schedule raises the rate, the highest one. None leaves it as it is.
        from_best: Whether the phase begins with the weights of the best checkpoint so far, and with
            them an average of the weights (`ema`). A warning tells if there is none.

    Raises:
        UserError: A value is out of range.
    """

    train: list[str] | str
    epoch: int | None = None
    patience: int | None = None
    lr: float | None = None
    from_best: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = as_primitive(field.name, getattr(self, field.name))
            object.__setattr__(self, field.name, value)
        object.__setattr__(self, "train", as_list(self.train))
        stages_or_patterns = 'a list of stages or patterns, such as ["head"]'
        check("train", self.train, _is_list_of_text, stages_or_patterns)
        check_patterns("train", self.entries)
        if self.epoch is not None:
            check("epoch", self.epoch, lambda n: n >= 0, "0 or a later one")
        if self.patience is not None:
            check("patience", self.patience, lambda n: n >= 1, "1 epoch or more")
        if self.lr is not None:
            check("lr", self.lr, lambda x: 0 < x <= MAX_LEARNING_RATE, RATE)

    @property
    def entries(self) -> list[str]:
        """`train` as the list that it is after the constructor."""
        assert isinstance(self.train, list)
        return self.train


def as_list(value: Any) -> Any:
    """Return a text as a list of one, and everything else as it is."""
    return [value] if isinstance(value, str) else value


def _is_list_of_text(value: Any) -> bool:
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(text, str) for text in value)


def check_patterns(option: str, patterns: Sequence[str]) -> None:
    """Check that each pattern is a regular expression.

    Raises:
        UserError: A pattern is none; the error names the option and the pattern.
    """
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(
                f"{option} has {pattern!r}, which is not a regular expression ({error})."
            ) from None


def check_phases(phases: Sequence[Phase]) -> None:
    """Check that it is clear when each phase of a run begins.

    Raises:
        UserError: The first phase has more than `train`, a later one does not have one of `epoch`
            and `patience`, or a phase would begin after a later one.
    """
    for phase in phases:
        if not isinstance(phase, Phase):
            raise UserError(
                f'phases has {phase!r}: give "gradual", or a list of phases, such as '
                f'[Phase(["head"]), Phase(["all"], epoch=5)].'
            )
    first = phases[0]
    if first != Phase(first.train):
        raise UserError(
            f"The first phase begins with the run, at the optimizer's rate: give it train alone: "
            f"{first}."
        )
    epochs = []
    for phase in phases[1:]:
        if (phase.epoch is None) == (phase.patience is None):
            raise UserError(
                f"A phase after the first begins by an epoch or by a patience: {phase}."
            )
        if phase.epoch is not None:
            epochs.append(phase.epoch)
    if epochs != sorted(epochs):
        raise UserError(
            f"phases come in the order in which they begin, not at the epochs {epochs}."
        )


def stages_of(module: nn.Module) -> dict[str, list[str]]:
    """Return the stages of a module's `network`, or of the module itself where it has none.

    The layers that the module's `heads` names, in its network or in itself, are the stage "head".

    Returns:
        The names of parameters and buffers in `module`, by stage, from stem to head.

    Raises:
        UserError: A name in `heads` that no submodule has.
    """
    heads = _head_names(module)
    modules = dict(module.named_modules())
    prefix = _network_prefix(module)
    if not all(prefix + head in modules for head in heads):
        prefix = ""
    for head in heads:
        if prefix + head not in modules:
            raise UserError(
                f"{type(module).__name__}.heads names {head!r}, which is none of its submodules."
            )
    network = modules[prefix.removesuffix(".")]
    names_by_stage = {}
    for stage, names in find_stages(network, heads).items():
        names_by_stage[stage] = [prefix + name for name in names]
    return names_by_stage


def _head_names(module: nn.Module) -> list[str]:
    """Return the texts in a module's attribute `heads`; none if it is something else."""
    heads = as_list(getattr(module, "heads", ()))
    if not isinstance(heads, list | tuple | set):
        return []
    return [head for head in heads if isinstance(head, str)]


def _network_prefix(module: nn.Module) -> str:
    """Return what the names in a module's `network` begin with: "network.", "classifier.network.".

    The attribute may be a property. "" where there is none, or the module does not contain it.
    """
    network = lightning_internals.uncompiled(getattr(module, "network", None))
    for name, submodule in module.named_modules():
        if submodule is network and name:
            return f"{name}."
    return ""


def names_to_train(
    module: nn.Module, train: Sequence[str], stages: Mapping[str, Collection[str]]
) -> set[str]:
    """Return the names of the parameters and buffers that a phase begins to train.

    Args:
        module: Module that has the parameters.
        train: `Phase.train`.
        stages: Stages of the module, as `stages_of` returns them.

    Raises:
        UserError: An entry of `train` is no stage and matches no name.
    """
    names: set[str] = set()
    for entry in train:
        chosen: Collection[str]
        if entry == EVERYTHING:
            chosen = named_tensors(module).keys()
        elif entry in stages:
            chosen = stages[entry]
        else:
            chosen = matching_names(module, [entry])
        if not chosen:
            known = ", ".join([*stages, EVERYTHING])
            raise UserError(
                f"{entry!r} is no stage ({known}), and no parameter's name begins with it."
            )
        names.update(chosen)
    return names


def names_but_frozen(module: nn.Module, frozen: Sequence[str]) -> set[str]:
    """Return the names of the parameters and buffers that `BackboneFreeze.frozen` leaves to train.

    Tied weights are frozen if any of their names is.

    Raises:
        UserError: A pattern matches no parameter.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    tensors = named_tensors(module)
    frozen_tensors: set[int] = set()  # by identity
    for pattern in frozen:
        names = matching_names(module, [pattern])
        if names.isdisjoint(parameters):
            raise UserError(
                f"No parameter's name begins with {pattern!r}, which is to be frozen: see the "
                f"module's named_parameters()."
            )
        frozen_tensors.update(id(tensors[name]) for name in names)
    return {name for name, tensor in tensors.items() if id(tensor) not in frozen_tensors}


def matching_names(module: nn.Module, patterns: Sequence[str]) -> set[str]:
    r"""Return the names of the parameters and buffers that a pattern matches from their start.

    A pattern may call the module's `network` by that name, whatever it is registered as:
    `network\.fc` matches "classifier.network.fc.weight", as `classifier\.network\.fc` does.
    """
    prefix = _network_prefix(module)
    names = set()
    for name in named_tensors(module):
        alias = name
        if prefix and name.startswith(prefix):
            alias = "network." + name.removeprefix(prefix)
        for pattern in patterns:
            if re.match(pattern, name) or re.match(pattern, alias):
                names.add(name)
    return names


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a module by name; tied weights have several names."""
    tensors: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    tensors.update(module.named_buffers(remove_duplicate=False))
    return tensors


def first_phases(module: nn.Module, names_by_phase: Sequence[AbstractSet[str]]) -> dict[str, int]:
    """Return the number of the phase in which each parameter and buffer begins to train, by name.

    The number is `len(names_by_phase)` if no phase trains it. Tied weights begin with the first of
    their names.

    Args:
        module: Module that has the parameters.
        names_by_phase: What each phase begins to train, as `names_to_train` returns it.
    """
    tensors = named_tensors(module)
    first_of_tensor: dict[int, int] = {}  # by the identity of the tensor
    for number, names in enumerate(names_by_phase):
        for name in names:
            first_of_tensor.setdefault(id(tensors[name]), number)
    numbers = {}
    for name, tensor in tensors.items():
        numbers[name] = first_of_tensor.get(id(tensor), len(names_by_phase))
    return numbers


def frozen_modules(
    module: nn.Module, first_phases: Mapping[str, int], phase: int
) -> set[nn.Module]:
    """Return the modules that are frozen in a phase.

    A module is frozen if all of its parameters and buffers are, and then with everything in it.
    A module without parameters and buffers, such as a dropout, is frozen inside of a frozen module,
    and in an `nn.Sequential` if the next module that has some is frozen. Elsewhere the order in
    which modules were registered need not be that in which they run, so that a dropout beside a
    frozen backbone may be the head's: it is not frozen.

    Args:
        module: The whole module.
        first_phases: The phase in which each parameter and buffer begins to train, by name.
        phase: Number of the phase.
    """
    frozen: set[nn.Module] = set()
    _add_frozen(frozen, module, "", first_phases, phase)
    return frozen


def _add_frozen(
    frozen: set[nn.Module],
    module: nn.Module,
    prefix: str,
    first_phases: Mapping[str, int],
    phase: int,
) -> bool | None:
    """Add the frozen modules in `module`, whose names begin with `prefix`, to a set.

    Returns:
        Whether all parameters and buffers of the module are frozen; None if it has none.
    """
    states = []
    own_tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    for name, _ in own_tensors:
        states.append(first_phases.get(prefix + name, 0) > phase)
    children = []
    for name, child in module.named_children():
        state = _add_frozen(frozen, child, f"{prefix}{name}.", first_phases, phase)
        children.append((child, state))
        if state is not None:
            states.append(state)
    if type(module).forward is nn.Sequential.forward:
        following_is_frozen: bool | None = None
        for child, state in reversed(children):
            if state is not None:
                following_is_frozen = state
            elif following_is_frozen:
                frozen.update(child.modules())
    if not states:
        return None
    if all(states):
        frozen.update(module.modules())
    return all(states)


def explain_never_trained(
    module: nn.Module,
    first_phases: Mapping[str, int],
    phase_count: int,
    trainable: AbstractSet[nn.Parameter],
    optimized: AbstractSet[nn.Parameter],
) -> list[str]:
    """Return a sentence for each reason why parameters that are frozen at first never train.

    Args:
        module: Module that has the parameters.
        first_phases: The phase in which each parameter begins to train, by name.
        phase_count: Number of phases of the run.
        trainable: Parameters that required a gradient before the fit.
        optimized: Parameters that an optimizer has.
    """
    names_by_reason: dict[str, list[str]] = {}
    for name, parameter in module.named_parameters():
        first_phase = first_phases[name]
        if first_phase == 0:
            continue
        if first_phase == phase_count:
            reason = "stay frozen, because no phase trains them"
        elif parameter not in trainable:
            reason = "stay frozen, because the module itself has fixed them"
        elif parameter not in optimized:
            reason = "never train, because no optimizer has them"
        else:
            continue
        names_by_reason.setdefault(reason, []).append(name)
    sentences = []
    for reason, names in names_by_reason.items():
        sentences.append(f"{len(names)} tensors of parameters, such as {names[0]}, {reason}.")
    return sentences


def describe_epochs(epoch: int, next_phase: Phase | None, max_epochs: int | None) -> str:
    """Return the epochs of a phase as people count them: "Epoch 1", "Epochs 6 to 40".

    Args:
        epoch: Epoch in which the phase begins, from 0.
        next_phase: Phase that comes after it, if there is one.
        max_epochs: Epochs of the run; None or -1 if they are not limited.
    """
    first = counted(epoch)
    last = math.inf
    if max_epochs is not None and max_epochs > 0:
        last = max_epochs
    if next_phase is not None:
        if next_phase.epoch is None:
            return f"From epoch {first}"
        last = min(last, next_phase.epoch)  # the next phase begins with the epoch after it
    if last == math.inf:
        return f"From epoch {first}"
    if last == first:
        return f"Epoch {first}"
    return f"Epochs {first} to {last}"


def describe_training(phases: Sequence[Phase], is_first: bool) -> str:
    """Return in a few words what begins to train, and at which rate: "everything at rate 0.0001".

    Args:
        phases: Phases that begin in the same epoch.
        is_first: Whether they begin the run.
    """
    names = []
    for phase in phases:
        names.extend(phase.entries)
    if EVERYTHING in names:
        text = "everything"
    elif names == [ALL_BUT_FROZEN]:
        text = "partly frozen"
    elif is_first and names == [HEAD]:
        text = "backbone frozen"
    elif is_first:
        text = f"only {', '.join(names)}"
    else:
        text = f"{', '.join(names)} unfrozen"
    for phase in phases:
        if phase.lr is not None:
            text += f" at rate {phase.lr:g}"
    return text
