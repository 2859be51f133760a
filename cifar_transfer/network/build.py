"""Build a network by name, with a head for the data's classes: torchvision's, timm's or LeNet-5."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torchvision import models

from cifar_transfer.base.errors import UserError
from cifar_transfer.network import catalog, weights
from cifar_transfer.network.catalog import LENET, Weights
from cifar_transfer.network.dense_conv import DenseConv2d
from cifar_transfer.network.lenet import lenet5
from cifar_transfer.network.small_images import ASSUMED_SIDE, adapt
from cifar_transfer.network.weights import Pretrained

# Heads of stock networks have this many outputs, and none of their other layers has. Heads are
# found by it.
IMAGENET_CLASSES = 1000
# torchvision builds these two with options of their own, and with auxiliary heads unless told
# otherwise.
INCEPTION_NAMES = ("googlenet", "inception_v3")


@dataclass(frozen=True)
class Backbone:
    """A network that is ready for training.

    Attributes:
        network: Takes normalised images, float32 [B, 3, H, W], and returns logits [B, num_classes].
        heads: Names of the layers that tell the classes apart. All other layers are the backbone.
        image_size: Side of the images in pixels, None if images keep their size.
        normalize: The means and deviations that the weights were trained with, None if unknown.
        changes: What was adapted to small images or to the image size, one sentence each.
        pretraining: Description of the network whose checkpoint gave the weights, as the checkpoint
            stores it. Empty if the weights come from elsewhere.
    """

    network: nn.Module
    heads: tuple[str, ...]
    image_size: int | None
    normalize: list[list[float]] | None
    changes: list[str]
    pretraining: dict[str, Any]


def build_backbone(
    name: str,
    weights_name: str,
    num_classes: int,
    class_names: Sequence[str] | None = None,
    *,
    image_size: int | str | None = None,
    small_images: bool = False,
    patch_size: int | None = None,
) -> Backbone:
    """Build a network, load its weights, and adapt it to the images.

    Args:
        name: "resnet18" and the like from torchvision, "timm/vit_base_patch16_224" (or with a tag)
            from timm, or "lenet5".
        weights_name: "DEFAULT" or another name that the library has for the weights, "none", or a
            file.
        num_classes: Number of the data's classes.
        class_names: Names of the classes. The head of one of our checkpoints is kept only if it
            tells these classes apart.
        image_size: Side of the images in pixels, "native" for the size that the weights were
            trained with, None if unknown.
        small_images: Adapt the network to small images, see `small_images.adapt`.
        patch_size: Side of a transformer's patches in pixels, None for its own.

    Raises:
        UserError: The network or weights are unknown, a file is missing or does not fit, a download
            failed, or the network cannot take the size.
    """
    catalog.check(name)
    pretrained = weights.read(name, weights_name)
    published = pretrained.published or catalog.default_weights(name)
    side = _resolve_image_size(name, image_size, pretrained, published)
    _check_min_side(name, side, published, small_images)
    network, heads = build_with_head(name, num_classes, initialise=not pretrained.state)
    if pretrained.state:
        _shape_like_weights(network, name, weights_name, pretrained, small_images)
        reason_to_drop_head = _compare_classes(pretrained.description, class_names)
        weights.load(network, pretrained.state, heads, weights_name, reason_to_drop_head)
    changes = adapt(network, side, patch_size, small_images)
    DenseConv2d.convert(network)
    return Backbone(
        network=network,
        heads=heads,
        image_size=side,
        normalize=_statistics(pretrained, published),
        changes=changes,
        pretraining=pretrained.description,
    )


def _resolve_image_size(
    name: str, image_size: int | str | None, pretrained: Pretrained, published: Weights | None
) -> int | None:
    """Return the side of the images in pixels, None if unknown. "native" is looked up."""
    if not isinstance(image_size, str):
        return image_size
    if pretrained.description:
        geometry = pretrained.description["geometry"]
        return geometry["input_side"] or min(geometry["size"])
    if published is not None:
        return published.native_side
    raise UserError(
        f"{name} has no published weights, so no native size: give image_size in pixels."
    )


def _check_min_side(
    name: str, side: int | None, published: Weights | None, small_images: bool
) -> None:
    """Raise `UserError` if the images are smaller than the library allows for the network."""
    if side is None or published is None or small_images:
        return
    if side < published.min_side < published.native_side:
        raise UserError(f"{name} cannot take images of {side} pixels: {size_hint(name)}")


def size_hint(name: str) -> str:
    """Return the end of a sentence: what to do if a network cannot take images of some size."""
    published = catalog.default_weights(name)
    if published is None:
        return f"set image_size, say {ASSUMED_SIDE}."
    min_side = ""
    if 1 < published.min_side < published.native_side:
        min_side = f"{published.min_side} or more, or "
    native = f"native ({published.native_side})"
    return f"set image_size={min_side}{native}, or try small_images=true."


def build_stock(name: str, initialise: bool = True) -> nn.Module:
    """Return the library's network for the 1000 classes of ImageNet, with random weights.

    Args:
        name: See `build_backbone`.
        initialise: Draw the weights of GoogLeNet and Inception v3 as their papers do. This is slow,
            and useless if other weights are loaded afterwards.

    Raises:
        UserError: There is no such network.
    """
    catalog.check(name)
    if name == LENET:
        return lenet5(IMAGENET_CLASSES)
    if catalog.is_timm(name):
        architecture, _ = catalog.split(name)
        return catalog.timm().create_model(architecture, num_classes=IMAGENET_CLASSES)
    if name in INCEPTION_NAMES:
        # torchvision trained its weights with transform_input. The auxiliary heads are left out.
        return models.get_model(
            name, aux_logits=False, init_weights=initialise, transform_input=True
        )
    return models.get_model(name)


def find_heads(network: nn.Module) -> tuple[str, ...]:
    """Return the names of the layers that tell the classes of a stock network apart.

    There are several if the network was distilled, as some DeiT are.
    """
    heads = []
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Linear) and layer.out_features == IMAGENET_CLASSES:
            heads.append(name)
        if isinstance(layer, nn.Conv2d) and layer.out_channels == IMAGENET_CLASSES:
            heads.append(name)
    return tuple(heads)


def build_with_head(
    name: str, num_classes: int, initialise: bool = True
) -> tuple[nn.Module, tuple[str, ...]]:
    """Return the network of `build_stock` with heads for other classes, and the names of the heads.

    Raises:
        UserError: There is no such network, or it has no head.
    """
    network = build_stock(name, initialise)
    heads = find_heads(network)
    if not heads:
        raise UserError(f"{name} tells no classes apart: it has no head that could be replaced.")
    for head in heads:
        network.set_submodule(head, _new_head(network.get_submodule(head), num_classes))
    return network, heads


def _new_head(stock_head: nn.Module, num_classes: int) -> nn.Module:
    """Return a layer like the head of a stock network, with one output for each class."""
    if isinstance(stock_head, nn.Linear):
        has_bias = stock_head.bias is not None
        return nn.Linear(stock_head.in_features, num_classes, bias=has_bias)
    assert isinstance(stock_head, nn.Conv2d)
    has_bias = stock_head.bias is not None
    kernel_size: Any = stock_head.kernel_size
    return nn.Conv2d(stock_head.in_channels, num_classes, kernel_size, bias=has_bias)


def _shape_like_weights(
    network: nn.Module,
    name: str,
    weights_name: str,
    pretrained: Pretrained,
    small_images: bool,
) -> None:
    """Bring a network to the shape that its weights have, before they are loaded.

    Raises:
        UserError: The weights are those of a checkpoint of another network, or need `small_images`.
    """
    description = pretrained.description
    if description:
        if catalog.split(description["backbone"])[0] != catalog.split(name)[0]:
            raise UserError(f"{weights_name} holds a {description['backbone']}, not a {name}.")
        if description["small_images"] and not small_images:
            raise UserError(
                f"{weights_name} was trained with small_images=true: ask for it here too."
            )
        trained_side = description["geometry"]["input_side"]
        adapt(network, trained_side, description["patch_size"], description["small_images"])
        return
    positions = pretrained.state.get("encoder.pos_embedding")
    if isinstance(network, models.VisionTransformer) and positions is not None:
        # torchvision publishes some ViTs for larger images. Beside the patches there is a class
        # token.
        grid = math.isqrt(positions.shape[1] - 1)
        adapt(network, grid * network.patch_size)


def _compare_classes(description: Mapping[str, Any], class_names: Sequence[str] | None) -> str:
    """Return why the head of a checkpoint is not wanted, "" if nothing is known against it."""
    trained_names = description.get("class_names")
    if not trained_names or not class_names:
        return ""
    if list(trained_names) == list(class_names):
        return ""
    return f"it tells apart {', '.join(trained_names[:3])}, ..."


def _statistics(pretrained: Pretrained, published: Weights | None) -> list[list[float]] | None:
    """Return the means and deviations that the weights were trained with, None if unknown."""
    if pretrained.description:
        geometry = pretrained.description["geometry"]
        return [list(geometry["mean"]), list(geometry["std"])]
    if published is not None:
        return [list(published.mean), list(published.std)]
    return None
