"""The stages of a network from stem to head, read from the tree of its modules: torchvision's, timm's and others'."""

from collections.abc import Collection

from torch import nn

STEM, HEAD = "stem", "head"
FEWEST = (
    4  # stages before the head; what has fewer parts is a wrapper, such as `features` or `encoder`
)


def stages(network: nn.Module, heads: Collection[str] = ()) -> dict[str, list[str]]:
    """The names of a network's parameters and buffers by stage, from stem to head.

    The module with the most matrices is opened until there are some stages. Modules come in the order in which they
    were registered, in torchvision and timm that of `forward` (but in Twins and CoaT, whose patch embeddings come
    first). What has no matrix, such as norms and position embeddings, goes with the stage before.

    Args:
        network: Any module.
        heads: Names of the submodules that are the stage "head", the last one. The first is "stem", and the others have
            the names of their modules, such as "layer1" or "features.3".
    """
    parts = [""]
    while True:
        mixed = [part for part in parts if any(_within(head, part) for head in heads)]
        if not mixed and len(parts) >= FEWEST:
            break
        inside = {part: _inside(network, part, heads) for part in parts}
        opened = max(
            mixed or (part for part in parts if inside[part]),
            key=lambda part: _matrices(network, part),
            default=None,
        )
        if opened is None:
            break
        at = parts.index(opened)
        parts[at : at + 1] = inside[opened]
    found: dict[str, list[str]] = {STEM: []}
    last: list[str] = []
    stage = STEM
    for prefix, module in network.named_modules(remove_duplicate=False):
        state = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        names = [f"{prefix}.{name}".lstrip(".") for name, _ in state]
        if any(_within(prefix, head) for head in heads):
            last += names
            continue
        if part := next((part for part in parts if _within(prefix, part)), ""):
            stage = STEM if part == parts[0] else f"{part}." if part in (STEM, HEAD) else part
        found.setdefault(stage, []).extend(names)
    return {stage: names for stage, names in {**found, HEAD: last}.items() if names}


def _inside(network: nn.Module, part: str, heads: Collection[str]) -> list[str]:
    children = (
        f"{part}.{name}".lstrip(".") for name, _ in network.get_submodule(part).named_children()
    )
    return [child for child in children if child not in heads and _matrices(network, child)]


def _matrices(network: nn.Module, part: str) -> int:
    return sum(parameter.ndim > 1 for parameter in network.get_submodule(part).parameters())


def _within(name: str, module: str) -> bool:
    return not module or name == module or name.startswith(f"{module}.")
