"""Networks by name, with a head for the data's classes, from torchvision, timm and 1998."""

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn
from torchvision import models

from cifar_transfer.base.errors import UserError
from cifar_transfer.network import catalog, weights
from cifar_transfer.network.catalog import LENET, TIMM
from cifar_transfer.network.dense_conv import DenseConv2d
from cifar_transfer.network.small_images import ASSUMED, adapt

_IMAGENET_CLASSES = 1000  # as many outputs have a network's heads, and none of its other layers: heads are found by it
AUXILIARY = ("googlenet", "inception_v3")  # have auxiliary heads


class Backbone(NamedTuple):
    """A network ready for training."""

    # float32; takes float [B, 3, H, W], normalised, and gives logits [B, num_classes], or while it trains with
    # auxiliary heads a tuple of logits, the main ones first.
    network: nn.Module
    heads: tuple[
        str, ...
    ]  # names of the layers that tell the classes apart; all the rest is the backbone
    image_size: int | None  # side of the images in pixels, None as it came
    normalize: (
        str | list[list[float]] | None
    )  # what the weights were trained with, as `--model.normalize` takes it
    changes: list[str]  # what was adapted to small images or to the size, a sentence each
    saved: dict[str, Any]  # the options of the run whose checkpoint gave the weights, else empty


def lenet5(num_classes: int) -> nn.Sequential:
    """LeNet-5 for three channels and 32 x 32 pixels (LeCun et al. 1998, section II.B), its last layer a linear one."""
    features = nn.Sequential(
        *(nn.Conv2d(3, 6, 5), nn.Tanh(), nn.AvgPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2)),
        *(nn.Conv2d(16, 120, 5), nn.Tanh(), nn.Flatten()),
    )
    classifier = nn.Sequential(nn.Linear(120, 84), nn.Tanh(), nn.Linear(84, num_classes))
    return nn.Sequential(OrderedDict(features=features, classifier=classifier))


def stock(name: str, auxiliary: bool = False, initialise: bool = True) -> nn.Module:
    """The library's network for the 1000 classes of ImageNet, with random weights.

    Args:
        name: As for `build`.
        auxiliary: Build GoogLeNet and Inception v3 with their auxiliary heads.
        initialise: Draw their weights as their papers do, which is slow, and needless if others are loaded.

    Raises:
        UserError: No such network, or none with auxiliary heads.
    """
    catalog.check(name)
    if auxiliary and name not in AUXILIARY:
        known = ", ".join(AUXILIARY)
        raise UserError(
            f"{name} has no auxiliary heads: leave aux_weight at 0 (those that have: {known})."
        )
    if name == LENET:
        return lenet5(_IMAGENET_CLASSES)
    if name.startswith(TIMM):
        return catalog.timm().create_model(catalog.split(name)[0], num_classes=_IMAGENET_CLASSES)
    if name in AUXILIARY:  # transform_input: as torchvision builds them for its weights
        return models.get_model(
            name, aux_logits=auxiliary, init_weights=initialise, transform_input=True
        )
    return models.get_model(name)


def head_names(network: nn.Module) -> tuple[str, ...]:
    """The layers that tell a stock network's classes apart: several with auxiliary (the last) or distillation heads."""
    names = [
        name
        for name, layer in network.named_modules()
        if (isinstance(layer, nn.Linear) and layer.out_features == _IMAGENET_CLASSES)
        or (isinstance(layer, nn.Conv2d) and layer.out_channels == _IMAGENET_CLASSES)
    ]
    return tuple(sorted(names, key=lambda name: name.startswith(weights.AUXILIARY)))


def with_head(
    name: str, num_classes: int, auxiliary: bool = False, initialise: bool = True
) -> tuple[nn.Module, tuple[str, ...]]:
    """The network of `stock` with a head for so many classes, and the names of its heads.

    Raises:
        UserError: As `stock`, or a network without a head.
    """
    network = stock(name, auxiliary, initialise)
    heads = head_names(network)
    if not heads:
        raise UserError(f"{name} tells no classes apart: it has no head that could be replaced.")
    for head in heads:
        old: Any = network.get_submodule(head)
        if isinstance(old, nn.Linear):
            new: nn.Module = nn.Linear(old.in_features, num_classes, bias=old.bias is not None)
        else:
            new = nn.Conv2d(
                old.in_channels, num_classes, old.kernel_size, bias=old.bias is not None
            )
        network.set_submodule(head, new)
    return network, heads


def build(
    name: str,
    pretrained: str,
    num_classes: int,
    class_names: Sequence[str] | None = None,
    *,
    image_size: int | str | None = None,
    small: bool = False,
    patch: int | None = None,
    auxiliary: bool = False,
) -> Backbone:
    """A network with a head for the data's classes.

    Args:
        name: "resnet18" and the like from torchvision, "timm/vit_base_patch16_224" (or with a tag) from timm, "lenet5".
        pretrained: "DEFAULT" or another of the library's names for the network's weights; "none"; or a file.
        class_names: The head of a checkpoint of ours is kept only when it tells these apart.
        image_size: Side of the images in pixels; "native" for what the weights were trained with; None if not known.
        small: Adapt it to small images, see `small_images.adapt`.
        patch: Side of a transformer's patches in pixels, None for its own.
        auxiliary: Train auxiliary heads too (GoogLeNet, Inception v3).

    Raises:
        UserError: An unknown network or weights' name, a missing or unfit file, a failed download, or a size that the
            network cannot take.
    """
    catalog.check(name)
    known = list(catalog.weights(name).values())
    source = weights.read(name, pretrained)
    published = source.published or (known[0] if known else None)
    if isinstance(image_size, str):
        size = _trained_side(source.saved) or (published.native if published else None)
        if not size:
            raise UserError(
                f"{name} has no published weights, so no native size: give image_size in pixels."
            )
    else:
        size = image_size
    if published and size and size < published.least < published.native and not small:
        raise UserError(f"{name} cannot take images of {size} pixels: {size_hint(name)}")
    network, heads = with_head(name, num_classes, auxiliary, initialise=not source.state)
    _shape_for(network, name, source, pretrained, small)
    if source.state:
        before, unwanted = source.saved.get("class_names"), ""
        if before and class_names and list(before) != list(class_names):
            unwanted = f"it tells apart {', '.join(before[:3])}, ..."
        weights.load(network, source.state, heads, pretrained, unwanted)
    changes = adapt(network, size, patch, small)
    DenseConv2d.convert(network)
    statistics = [list(published.mean), list(published.std)] if published else None
    if source.saved:
        geometry = source.saved["geometry"]
        statistics = [geometry["mean"], geometry["std"]]
    return Backbone(network, heads, size, statistics, changes, source.saved)


def _trained_side(saved: dict[str, Any]) -> int | None:
    """Return the side of the images that the network of a checkpoint of ours takes, if it is one."""
    if not saved:
        return None
    geometry = saved["geometry"]
    return geometry["input_side"] or min(geometry["size"])


def size_hint(name: str) -> str:
    """What to do about images of a size that a network cannot take, the end of a sentence."""
    published = next(iter(catalog.weights(name).values()), None)
    if published is None:
        return f"set image_size, say {ASSUMED}."
    least = f"{published.least} or more, or " if 1 < published.least < published.native else ""
    return f"set image_size={least}native ({published.native}), or try small_images=true."


def _shape_for(
    network: nn.Module, name: str, source: weights.Pretrained, pretrained: str, small: bool
) -> None:
    """Bring the network to the form that the weights have."""
    saved = source.saved
    if saved:
        if catalog.split(saved["backbone"])[0] != catalog.split(name)[0]:
            raise UserError(f"{pretrained} holds a {saved['backbone']}, not a {name}.")
        if saved["small_images"] and not small:
            raise UserError(
                f"{pretrained} was trained with small_images=true: ask for it here too."
            )
        adapt(
            network,
            saved["geometry"]["input_side"],
            saved["patch_size"],
            saved["small_images"],
        )
    elif isinstance(network, models.VisionTransformer) and "encoder.pos_embedding" in source.state:
        tokens = (
            source.state["encoder.pos_embedding"].shape[1] - 1
        )  # torchvision publishes some for larger images
        adapt(network, math.isqrt(tokens) * network.patch_size)
