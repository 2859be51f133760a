"""Where in an image a network sees its class: Grad-CAM (Selvaraju et al. 2017, https://arxiv.org/abs/1610.02391).

The channels of a late layer are summed, each weighted by the mean of the class's gradient over its positions. The
layer is the last one of the network's trunk that still has a few positions: at 32 pixels the last stages of ResNet18
have one, or four, and say nothing of places.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.vision_transformer import Encoder

from cifar_transfer.base.errors import UserError
from cifar_transfer.data.geometry import Size, to_float
from cifar_transfer.network.image_classifier import ImageClassifier
from cifar_transfer.results import gallery, plots
from cifar_transfer.results.predictions import ImagePrediction

SIDES = (4, 2)  # positions along a side that are wanted, or else at least


def heat_map(model: ImageClassifier, pixels: np.ndarray) -> np.ndarray:
    """How much each place of an image speaks for its likeliest class.

    Args:
        model: In eval mode.
        pixels: uint8 [3, H, W], RGB, of the size that the network was trained on.

    Returns:
        float32 [H, W]; 1 at the place that speaks most, 0 where nothing does, which may be everywhere.

    Raises:
        UserError: No layer has places.
    """
    outputs: list[object] = []
    with torch.enable_grad(), ExitStack() as hooks:
        for layer in _trunk(model.network):
            hooks.enter_context(
                layer.register_forward_hook(lambda _, inputs, output: outputs.append(output))
            )
        # The gradient of the images is not used, but with it there are others where all parameters are frozen.
        images = to_float(torch.from_numpy(pixels)[None].to(model.device)).requires_grad_()
        best = model(images).max()
    tensors = [output for output in outputs if isinstance(output, Tensor)]
    gradients = torch.autograd.grad(best, tensors, allow_unused=True)
    size = model.geometry.input_size
    layers = [
        (_places(output.detach(), size), _places(gradient, size))
        for output, gradient in zip(reversed(tensors), reversed(gradients), strict=True)
        if gradient is not None
    ]
    for side in SIDES:
        for values, weights in layers:
            # Behind its last attention a ViT reads the token of the class alone, and the others have no gradient.
            if (
                values is None
                or weights is None
                or not weights.any()
                or min(values.shape[1:]) < side
            ):
                continue
            heat = (weights.mean((1, 2), keepdim=True) * values).sum(0).relu()
            heat = F.interpolate(heat[None, None], size=pixels.shape[1:], mode="bilinear")[0, 0]
            return (heat / heat.max().clamp(min=torch.finfo(heat.dtype).tiny)).cpu().numpy()
    name = model.backbone
    raise UserError(
        f"There is no heat map of {name} at this size: no layer of it has 2 x 2 places or more."
    )


def _trunk(network: nn.Module) -> Iterator[nn.Module]:
    """The layers through which everything passes one after the other; not those within branches of a block."""
    for layer in network.children():
        if isinstance(layer, nn.Sequential | nn.ModuleList | Encoder):
            yield from _trunk(layer)
        elif not isinstance(
            layer, nn.AdaptiveAvgPool2d
        ):  # VGG's makes 7 x 7 places of one, all alike
            yield layer


def _places(values: Tensor, size: Size) -> Tensor | None:
    """What a layer gives for an image of a size as [C, h, w] of the same proportion, or None if it has no places.

    It gives [1, C, h, w]; [1, h, w, C] (Swin); or [1, N, C], tokens behind a few of the class (ViT).
    """
    values, (height, width) = values[0], size
    if values.ndim == 2:
        rows = math.isqrt(len(values) * height // width)
        columns = rows * width // height
        return values[len(values) - rows * columns :].T.unflatten(1, (rows, columns))
    for order in ((0, 1, 2), (2, 0, 1)) if values.ndim == 3 else ():
        places = values.permute(order)
        rows, columns = places.shape[1:]
        if abs(rows * width - columns * height) < max(size):
            return places
    return None


def explained(
    predictions: Iterable[ImagePrediction], model: ImageClassifier, folder: Path
) -> Iterator[ImagePrediction]:
    """Pass predictions on, after the heat map of each has been drawn as `folder/NUMBER-NAME.png`."""
    for number, prediction in enumerate(predictions, 1):
        figure = gallery.heated(prediction, heat_map(model, prediction.pixels))
        plots.save(figure, folder / f"{number:05d}-{Path(str(prediction.source)).stem[:60]}.png")
        yield prediction
