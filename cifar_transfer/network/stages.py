"""The stages of a network, from stem to head, found in the tree of its modules.

The same rule serves the networks of torchvision, of timm, and of anybody else.
"""

from collections.abc import Collection

from torch import nn

STEM = "stem"
HEAD = "head"
# A module with fewer parts is only a wrapper, such as `features` or `encoder`.
MIN_STAGES_BEFORE_HEAD = 4


def find_stages(network: nn.Module, heads: Collection[str] = ()) -> dict[str, list[str]]:
    """Return the names of a network's parameters and buffers by stage, from stem to head.

    The first stage is called "stem" and the last one "head". The others have the names of their
    modules, such as "layer1" or "features.3".

    The order is the one in which the modules were registered. In torchvision and timm it is that of
    `forward`, but in Twins and CoaT, whose patch embeddings come first. A module without matrices,
    such as a norm or position embeddings, belongs to the stage before it.

    Args:
        network: Any module.
        heads: Names of the submodules that are the stage "head".
    """
    stage_modules = _find_stage_modules(network, heads)
    tensors_by_stage: dict[str, list[str]] = {STEM: []}
    head_tensors: list[str] = []
    stage = STEM
    for module_name, module in network.named_modules(remove_duplicate=False):
        tensors = _tensor_names(module_name, module)
        if _is_inside_any(module_name, heads):
            head_tensors.extend(tensors)
            continue
        for stage_module in stage_modules:
            if _is_inside(module_name, stage_module):
                stage = _stage_name(stage_module, stage_modules)
        tensors_by_stage.setdefault(stage, []).extend(tensors)
    tensors_by_stage[HEAD] = head_tensors
    return {stage: tensors for stage, tensors in tensors_by_stage.items() if tensors}


def _find_stage_modules(network: nn.Module, heads: Collection[str]) -> list[str]:
    """Return the names of the modules that are the stages before the head, in order.

    The search begins with the network itself as the only stage. It replaces a module by its
    children until no stage contains a head and there are enough stages.
    """
    names = [""]
    while True:
        opened = _choose_module_to_open(network, names, heads)
        if opened is None:
            return names
        position = names.index(opened)
        names[position : position + 1] = _children_with_matrices(network, opened, heads)


def _choose_module_to_open(
    network: nn.Module, names: list[str], heads: Collection[str]
) -> str | None:
    """Return the module with the most matrices that has to be opened, or None if none has to."""
    candidates = [name for name in names if _contains_any(name, heads)]
    if not candidates:
        if len(names) >= MIN_STAGES_BEFORE_HEAD:
            return None
        candidates = [name for name in names if _children_with_matrices(network, name, heads)]
    if not candidates:
        return None
    return max(candidates, key=lambda name: _count_matrices(network, name))


def _children_with_matrices(network: nn.Module, name: str, heads: Collection[str]) -> list[str]:
    """Return the full names of a module's children, without heads and those without matrices."""
    children = []
    for child_name, _ in network.get_submodule(name).named_children():
        full_name = _join(name, child_name)
        if full_name not in heads and _count_matrices(network, full_name) > 0:
            children.append(full_name)
    return children


def _count_matrices(network: nn.Module, name: str) -> int:
    """Return how many parameters of a module have two dimensions or more."""
    count = 0
    for parameter in network.get_submodule(name).parameters():
        if parameter.ndim > 1:
            count += 1
    return count


def _stage_name(stage_module: str, stage_modules: list[str]) -> str:
    """Return what the stage of a module is called."""
    if stage_module == stage_modules[0]:
        return STEM
    if stage_module in (STEM, HEAD):
        return f"{stage_module}."  # as in timm's SelecSLS, where "head" is a part of the backbone
    return stage_module


def _tensor_names(module_name: str, module: nn.Module) -> list[str]:
    """Return the full names of a module's parameters and buffers, without those of its children."""
    names = []
    for name, _ in module.named_parameters(recurse=False):
        names.append(_join(module_name, name))
    for name, _ in module.named_buffers(recurse=False):
        names.append(_join(module_name, name))
    return names


def _join(module_name: str, name: str) -> str:
    """Return the full name of what a module has."""
    return f"{module_name}.{name}".lstrip(".")


def _is_inside(name: str, module_name: str) -> bool:
    """Return whether a module is another one, or is inside it. The network itself is called ""."""
    return not module_name or name == module_name or name.startswith(f"{module_name}.")


def _is_inside_any(name: str, module_names: Collection[str]) -> bool:
    """Return whether a module is one of some others, or is inside one of them."""
    return any(_is_inside(name, module_name) for module_name in module_names)


def _contains_any(module_name: str, names: Collection[str]) -> bool:
    """Return whether one of some modules is this one, or is inside it."""
    return any(_is_inside(name, module_name) for name in names)
