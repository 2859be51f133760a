"""Where in an image a network sees its class: Grad-CAM (Selvaraju et al. 2017).

The channels of a late layer are summed, each weighted by the mean gradient of the class over the
channel's positions (https://arxiv.org/abs/1610.02391). The layer is the last one of the network's
trunk that still has a few positions. At 32 pixels the last stages of ResNet18 have one or four,
which say nothing about places.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.vision_transformer import Encoder

from cifar_transfer.base.errors import UserError
from cifar_transfer.data.geometry import Size, to_float
from cifar_transfer.network.image_classifier import ImageClassifier

# Positions along each side of the layer: a layer with 4 is preferred to a later one with 2.
PREFERRED_POSITIONS = 4
MIN_POSITIONS = 2


def heat_map(classifier: ImageClassifier, pixels: np.ndarray) -> np.ndarray:
    """Return how much each place of an image speaks for the likeliest class.

    Args:
        classifier: The network, in eval mode.
        pixels: The image, uint8 [3, H, W], RGB, of the size that the network was trained on.

    Returns:
        float32 [H, W]; 1 at the place that speaks most for the class, 0 where nothing does, which
        may be everywhere. It is 0 outside of the centre if that is all that the network sees.

    Raises:
        UserError: No layer has enough positions.
    """
    layers = list(_spatial_layers(classifier, pixels))
    for min_positions in (PREFERRED_POSITIONS, MIN_POSITIONS):
        for activations, gradients in layers:
            if min(activations.shape[1:]) >= min_positions:
                rows, columns = classifier.geometry.seen_centre
                heat = np.zeros(pixels.shape[1:], np.float32)
                seen_size = heat[rows, columns].shape
                heat[rows, columns] = _grad_cam(activations, gradients, seen_size)
                return heat
    raise UserError(
        f"There is no heat map of {classifier.backbone} at this size: "
        "no layer of it has 2 x 2 places or more."
    )


def _grad_cam(activations: Tensor, gradients: Tensor, size: Size) -> np.ndarray:
    """Return the map of a layer's activations and gradients, both [C, h, w], at a size."""
    weights = gradients.mean((1, 2), keepdim=True)
    heat = (weights * activations).sum(0).relu()
    heat = F.interpolate(heat[None, None], size=size, mode="bilinear")[0, 0]
    tiny = torch.finfo(heat.dtype).tiny
    result: np.ndarray = (heat / heat.max().clamp(min=tiny)).cpu().numpy()
    return result


def _spatial_layers(
    classifier: ImageClassifier, pixels: np.ndarray
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield activations and gradients, both [C, h, w], of each layer that has positions.

    They begin with the last layer. The gradients are of the logit of the likeliest class.
    """
    outputs: list[Tensor] = []

    def keep_output(module: nn.Module, inputs: object, output: object) -> None:
        if isinstance(output, Tensor):
            outputs.append(output)

    with torch.enable_grad(), ExitStack() as hooks:
        for layer in _trunk(classifier.network):
            hooks.enter_context(layer.register_forward_hook(keep_output))
        images = to_float(torch.from_numpy(pixels)[None].to(classifier.device))
        # If all parameters are frozen, only this lets the layers have gradients.
        images.requires_grad_()
        best_logit = classifier(images).max()
    gradients = torch.autograd.grad(best_logit, outputs, allow_unused=True)

    input_size = classifier.geometry.input_size
    for output, gradient in zip(reversed(outputs), reversed(gradients), strict=True):
        if gradient is None:
            continue
        activations = _positions(output.detach(), input_size)
        weights = _positions(gradient, input_size)
        # Behind its last attention a ViT reads the class token alone: the patches have no gradient.
        if activations is not None and weights is not None and weights.any():
            yield activations, weights


def _trunk(network: nn.Module) -> Iterator[nn.Module]:
    """Yield the layers that everything passes through one after another, not those in branches."""
    for layer in network.children():
        if isinstance(layer, nn.Sequential | nn.ModuleList | Encoder):
            yield from _trunk(layer)
        elif not isinstance(layer, nn.AdaptiveAvgPool2d):  # VGG's copies one position to 7 x 7
            yield layer


def _positions(values: Tensor, size: Size) -> Tensor | None:
    """Return the output of a layer for one image as [C, h, w], or None if it has no positions.

    Args:
        values: [1, C, h, w]; [1, h, w, C] (Swin); or [1, N, C], where a few tokens for the class
            come before those for the positions (ViT).
        size: Height and width of the image in pixels; h and w have the same proportion.
    """
    values = values[0]
    height, width = size
    if values.ndim == 2:
        rows = math.isqrt(len(values) * height // width)
        columns = rows * width // height
        class_tokens = len(values) - rows * columns
        return values[class_tokens:].T.unflatten(1, (rows, columns))
    if values.ndim == 3:
        for candidate in (values, values.permute(2, 0, 1)):
            rows, columns = candidate.shape[1:]
            if abs(rows * width - columns * height) < max(size):
                return candidate
    return None
