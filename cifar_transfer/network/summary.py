"""A summary of a backbone before it is trained: a row of a table, and a closer look."""

from dataclasses import dataclass

import torch
from torch import nn

from cifar_transfer.base.errors import UserError, first_line
from cifar_transfer.network import catalog
from cifar_transfer.network.build import Backbone, build_backbone
from cifar_transfer.network.catalog import LENET, Weights
from cifar_transfer.network.small_images import ASSUMED_SIDE
from cifar_transfer.network.stages import find_stages

NUM_CLASSES = 10  # of the head in a closer look


@dataclass(frozen=True)
class BackboneSummary:
    """What the library says of a network. None where it does not say.

    Attributes:
        name: Name of the network.
        parameters: Number of parameters with the head. timm does not say.
        top1_error: Top-1 error on the validation set of ImageNet-1k, in per cent. timm does not
            say.
        top5_error: Top-5 error on the same set, in per cent. timm does not say.
        native: Side of the images that the default weights were trained with, in pixels.
        weights: Names of the published weights, the default first.
        licence_or_source: Licence of the default weights, or where they come from.
    """

    name: str
    parameters: int | None
    top1_error: float | None
    top5_error: float | None
    native: int | None
    weights: list[str]
    licence_or_source: str | None


def summarise(name: str) -> BackboneSummary:
    """Return what the library says of a network."""
    weights_names = list(catalog.weights(name))
    default = catalog.default_weights(name)
    if default is None:
        native = ASSUMED_SIDE if name == LENET else None
        return BackboneSummary(name, None, None, None, native, weights_names, None)
    return BackboneSummary(
        name=name,
        parameters=default.parameters,
        top1_error=default.top1_error,
        top5_error=default.top5_error,
        native=default.native_side,
        weights=weights_names,
        licence_or_source=default.licence or default.source,
    )


@dataclass(frozen=True)
class BackboneDetails:
    """A closer look at a network, from its modules.

    Attributes:
        name: Name of the network.
        side: Side of the images in pixels.
        stem: Name and description of the first layer.
        heads: Names and descriptions of the layers that tell the classes apart.
        stages: Names of the stages from stem to head.
        parameters: Number of all parameters.
        frozen_parameters: Number of parameters that are frozen while only the heads train.
        weights: The published weights.
        small_side: Side of the images in pixels with `small_images`.
        small_changes: What `small_images` changes, one sentence each.
    """

    name: str
    side: int | None
    stem: str
    heads: list[str]
    stages: list[str]
    parameters: int
    frozen_parameters: int
    weights: list[Weights]
    small_side: int | None
    small_changes: list[str]


def inspect_backbone(name: str, image_size: int | None) -> BackboneDetails:
    """Build a network, without weights, and look at it.

    Args:
        name: Name of the network.
        image_size: Side of the images in pixels. None means 32, or the smallest side that the
            network takes if that is more.

    Raises:
        UserError: There is no such network, or it cannot take the size.
    """
    catalog.check(name)
    stock = _build_at_first_side(name, image_size, small_images=False)
    adapted = _build_at_first_side(name, image_size, small_images=True)
    network = stock.network
    heads = []
    head_parameters = 0
    for head in stock.heads:
        layer = network.get_submodule(head)
        heads.append(f"{head}: {layer}")
        head_parameters += _count_parameters(layer)
    parameters = _count_parameters(network)
    return BackboneDetails(
        name=name,
        side=stock.image_size,
        stem=_describe_stem(network),
        heads=heads,
        stages=list(find_stages(network, stock.heads)),
        parameters=parameters,
        frozen_parameters=parameters - head_parameters,
        weights=list(catalog.weights(name).values()),
        small_side=adapted.image_size,
        small_changes=adapted.changes,
    )


def _build_at_first_side(name: str, image_size: int | None, small_images: bool) -> Backbone:
    """Build a network at a size, or at the first size that it takes."""
    if image_size is not None:
        sides = [image_size]
    else:
        sides = sorted({ASSUMED_SIDE, max(ASSUMED_SIDE, _min_side(name))})
    for side in sides[:-1]:
        try:
            return _build_and_try(name, side, small_images)
        except UserError:
            continue
    return _build_and_try(name, sides[-1], small_images)


def _min_side(name: str) -> int:
    """Return the side of the smallest images that all published weights take, in pixels."""
    min_side = 1
    for entry in catalog.weights(name).values():
        if entry.min_side < entry.native_side:
            min_side = max(min_side, entry.min_side)
    return min_side


def _build_and_try(name: str, side: int, small_images: bool) -> Backbone:
    """Build a network without weights, and pass an image through it.

    Raises:
        UserError: The network cannot take the size.
    """
    built = build_backbone(name, "none", NUM_CLASSES, image_size=side, small_images=small_images)
    try:
        built.network.eval()(torch.zeros(1, 3, side, side))
    except RuntimeError as error:
        raise UserError(
            f"{name} cannot take images of {side} pixels ({first_line(error)})."
        ) from None
    return built


def _describe_stem(network: nn.Module) -> str:
    """Return the name and description of the first convolution or linear layer."""
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            return f"{name}: {layer}"
    return "none"


def _count_parameters(module: nn.Module) -> int:
    """Return the number of parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())
