"""Networks made for 224 pixels, made fit for 32: stems, classifiers, patches and windows, the weights kept.

The adapted network does on a small image what the stock one does on its enlargement, without computing at that size.
"""

import inspect
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2
from torchvision.models.vision_transformer import interpolate_embeddings

from cifar_transfer.base.errors import UserError
from cifar_transfer.network.dense_conv import DenseConv2d, HalfMaxPool2d

ASSUMED = 32  # pixels, where a network must know the size of its images and nobody says it
TOKENS = 8  # patches along a side that a ViT is given at least with `small_images`, 16 for a Swin, which halves them
KEEPS_POOL = (models.AlexNet,)  # whose stem's stride of 4 is enough to lose


def adapt(
    network: nn.Module, size: int | None, patch: int | None = None, small: bool = False
) -> list[str]:
    """Fit a network to the size of its images, in place; whatever it has learned stays in it.

    Networks made for one size (ViT, Swin, BEiT, ...) are brought to `size` in any case, again and again if need be. The
    stem and the classifier are changed only with `small`, and once.

    Args:
        network: Of torchvision or timm, with its weights loaded.
        size: Side of the images in pixels, None if unknown.
        patch: Side of a transformer's patches in pixels; None keeps them, or with `small` takes them small enough for
            8 x 8 patches (Swin: 16 x 16).

    Returns:
        What was changed, a sentence each.

    Raises:
        UserError: The network has no patches, or they do not divide the size; or it takes its own size only.
    """
    size = size or ASSUMED
    if isinstance(network, models.VisionTransformer):
        return _vit(
            network,
            size,
            patch or (_patch(network.patch_size, size, TOKENS) if small else network.patch_size),
        )
    if isinstance(network, models.SwinTransformer):
        stock = network.features[0][0].stride[0]
        return _swin(
            network, size, patch or (_patch(stock, size, 2 * TOKENS) if small else stock), small
        )
    if hasattr(network, "set_input_size"):
        return _timm(network, size, patch, small)
    if patch is not None:
        raise UserError(
            f"patch_size is for transformers: {type(network).__name__} has no patches, leave it out."
        )
    fixed = getattr(network, "pretrained_cfg", {})
    if fixed.get("fixed_input_size") and fixed["input_size"][-1] != size:
        raise UserError(
            f"{fixed['architecture']} takes images of its own size only: set image_size=native."
        )
    return [*_stem(network), *_classifier(network, size)] if small else []


def _patch(stock: int, size: int, tokens: int) -> int:
    return min(stock, max(1, size // tokens))


def _side(value: int | tuple[int, ...]) -> int:
    return value if isinstance(value, int) else value[0]


def _conv(old: nn.Conv2d, kernel: Tensor, stride: int = 1, padding: int = 0) -> nn.Conv2d:
    """A convolution with another kernel and the old bias."""
    options: dict[str, Any] = {"bias": old.bias is not None, "device": old.weight.device}
    new = nn.Conv2d(old.in_channels, old.out_channels, kernel.shape[-1], stride, padding, **options)
    new.load_state_dict(old.state_dict() | {"weight": kernel})
    return new


def _stem(network: nn.Module) -> list[str]:
    """Keep the resolution, which a small image has too little of: stride 1, and a max-pool of half the reach."""
    layers = [
        (n, m)
        for n, m in network.named_modules()
        if isinstance(m, nn.Conv2d | nn.MaxPool2d | nn.Linear)
    ]
    (name, first), (pool, second) = layers[:2]
    if not isinstance(first, nn.Conv2d) or first.stride[0] == 1:
        return []
    same = (
        type(first).__name__ == "Conv2dSame"
    )  # timm's, for weights from TensorFlow: pads less before than behind
    if type(first) not in (nn.Conv2d, DenseConv2d) and not same:
        raise UserError(
            f"small_images does not know the stem of this network, {name}, a {type(first).__name__}."
        )
    factor, old = first.stride[0], first.kernel_size[0]
    offset, changes = -(max(0, old - factor) // 2 if same else int(first.padding[0])), []
    if isinstance(second, nn.MaxPool2d) and not isinstance(network, KEEPS_POOL):
        # A window of three covers the convolution's outputs 2i - 1, 2i, 2i + 1: the middle one stands for them.
        middle = (_side(second.kernel_size) - 1) // 2 - _side(second.padding)
        offset += factor * middle
        factor *= _side(second.stride)
        network.set_submodule(pool, HalfMaxPool2d())
        changes.append(f"{pool}: stride 1, half the reach")
    kernel = enlarged_kernel(first.weight.detach(), factor, offset)
    taps = kernel.shape[-1]
    network.set_submodule(name, _conv(first, kernel, padding=taps // 2))
    return [f"{name}: {taps}x{taps} stride 1 from {old}x{old} stride {first.stride[0]}", *changes]


def enlarged_kernel(kernel: Tensor, factor: int, offset: int) -> Tensor:
    """The kernel that does with stride 1 on an image what another does with stride `factor` on its enlargement.

    With K the old kernel and U the enlargement, both linear, it is U'K, because K(U(image)) = (U'K)(image).

    Args:
        kernel: float [O, I, K, K], for images enlarged `factor` times, bilinearly.
        offset: Of the first tap from the first pixel, in pixels of the enlargement; minus the padding.

    Returns:
        float [O, I, k, k], k odd, to be used with padding k // 2. Exact within the image, except that taps reaching
        less than a quarter pixel beyond k look at the outermost pixel instead.
    """
    # Where each tap looks, in small pixels.
    at = (torch.arange(kernel.shape[-1], dtype=torch.double) + offset + 0.5) / factor - 0.5
    radius = max(1, math.ceil(float(at.abs().max()) - 0.25))
    low = at.floor()
    taps = at.new_zeros(len(at), 2 * radius + 1)
    for position, share in ((low, 1 - (at - low)), (low + 1, at - low)):
        column = position.clamp(-radius, radius).long() + radius
        taps.scatter_add_(1, column[:, None], share[:, None])
    taps = taps.to(kernel)
    return torch.einsum("oikl,ka,lb->oiab", kernel, taps, taps)


def enlarged_patch(kernel: Tensor, size: int) -> Tensor:
    """As `enlarged_kernel`, for kernels without overlap (stride K): float [O, I, K, K] to [O, I, size, size]."""
    old = kernel.shape[-1]
    unit = torch.eye(size * size).view(size * size, 1, size, size)
    enlarge = (
        F.interpolate(unit, size=(old, old), mode="bilinear", antialias=True).flatten(1).to(kernel)
    )
    return (kernel.flatten(2) @ enlarge.T).unflatten(-1, (size, size))


def _classifier(network: nn.Module, size: int) -> list[str]:
    """Fold the pooling that VGG and AlexNet do to 7 x 7 or 6 x 6 into the first linear layer, when it only repeats."""
    if not isinstance(network, models.VGG | models.AlexNet):
        return []
    wide = _side(network.avgpool.output_size)
    index, old = next(
        (i, layer) for i, layer in enumerate(network.classifier) if isinstance(layer, nn.Linear)
    )
    device = old.weight.device
    with torch.no_grad():
        side = network.features(torch.zeros(1, 3, size, size, device=device)).shape[-1]
    if side >= wide:
        return []
    channels = old.in_features // wide**2
    unit = torch.eye(side**2, device=device).view(side**2, 1, side, side)
    spread = F.adaptive_avg_pool2d(unit, wide).flatten(
        1
    )  # [side², wide²]: where each value is repeated
    weight = (old.weight.detach().unflatten(1, (channels, wide**2)) @ spread.T).flatten(1)
    new = nn.Linear(channels * side**2, old.out_features, device=device)
    new.load_state_dict({"weight": weight, "bias": old.bias})
    network.classifier[index] = new
    network.avgpool = nn.AdaptiveAvgPool2d(side)
    return [
        f"classifier.{index}: {new.in_features:,} inputs, not {old.in_features:,} (exact at {size} pixels)"
    ]


def _divided(size: int, patch: int) -> int:
    if size % patch:
        raise UserError(
            f"Patches of {patch} pixels do not divide images of {size}: choose another patch_size."
        )
    return size // patch


def _vit(network: models.VisionTransformer, size: int, patch: int) -> list[str]:
    grid, changes = _divided(size, patch), []
    old, old_grid = network.patch_size, network.image_size // network.patch_size
    if patch != old:
        kernel = enlarged_patch(network.conv_proj.weight.detach(), patch)
        network.conv_proj = _conv(network.conv_proj, kernel, stride=patch)
        changes.append(f"conv_proj: patches of {patch} pixels, resampled from {old}")
    if grid != old_grid:
        key = "encoder.pos_embedding"
        state = interpolate_embeddings(size, patch, {key: network.encoder.pos_embedding.detach()})
        network.encoder.pos_embedding = nn.Parameter(state[key])
        changes.append(
            f"encoder.pos_embedding: {grid}x{grid}, interpolated from {old_grid}x{old_grid}"
        )
    network.image_size, network.patch_size, network.seq_length = size, patch, grid**2 + 1
    return changes


def _windows(grid: int, stock: int, stages: int) -> list[int]:
    """For each stage the largest window, up to the network's own, that divides its grid without padding."""
    grids = [max(1, grid // 2**stage) for stage in range(stages)]
    return [max(window for window in range(1, stock + 1) if side % window == 0) for side in grids]


def _swin(network: models.SwinTransformer, size: int, patch: int, small: bool) -> list[str]:
    changes, conv = [], network.features[0][0]
    if patch != conv.stride[0]:
        network.features[0][0] = _conv(
            conv, enlarged_patch(conv.weight.detach(), patch), stride=patch
        )
        changes.append(f"features.0.0: patches of {patch} pixels, resampled from {conv.stride[0]}")
    if small:
        stages = [
            [m for m in stage.modules() if isinstance(m, ShiftedWindowAttention)]
            for stage in network.features
        ]
        stages = [stage for stage in stages if stage]
        stock = stages[0][0].window_size[0]
        windows = _windows(_divided(size, patch), stock, len(stages))
        for attentions, window in zip(stages, windows, strict=True):
            for attention in attentions:
                _set_window(attention, window)
        changes.append(f"windows of {', '.join(map(str, windows))}, not {stock}, in the stages")
    return changes


def _set_window(attention: ShiftedWindowAttention, window: int) -> None:
    """A smaller window: neighbours at the same distance keep their bias, those now outside lose it."""
    old = attention.window_size[0]
    if window == old:
        return
    attention.window_size = [window, window]
    attention.shift_size = [window // 2 if shift else 0 for shift in attention.shift_size]
    attention.define_relative_position_index()
    inner = slice(old - window, old + window - 1)  # of the distances from -(old - 1) to old - 1
    if isinstance(
        attention, ShiftedWindowAttentionV2
    ):  # biases are computed from coordinates, [1, far, far, 2]
        attention.relative_coords_table = attention.relative_coords_table[:, inner, inner]
    else:
        far = 2 * old - 1
        table = attention.relative_position_bias_table.detach().unflatten(
            0, (far, far)
        )  # [far, far, heads]
        attention.relative_position_bias_table = nn.Parameter(
            table[inner, inner].flatten(0, 1).clone()
        )


def _timm(network: Any, size: int, patch: int | None, small: bool) -> list[str]:
    """timm's own resampling of patches, positions and relative biases."""
    options: dict[str, Sequence[int]] = {"img_size": (size, size)}
    changes: list[str] = []
    embed: Any = getattr(network, "patch_embed", None)
    if hasattr(embed, "img_size"):
        stock = _side(embed.patch_size)
        known = inspect.signature(network.set_input_size).parameters
        windowed = "window_size" in known and hasattr(
            network, "layers"
        )  # else timm scales the windows with the image
        patch = patch or (_patch(stock, size, TOKENS * (2 if windowed else 1)) if small else stock)
        grid = _divided(size, patch)
        if patch == stock and size == _side(embed.img_size):
            return []
        embedding = f"patch_embed: {grid}x{grid} patches of {patch} pixels, resampled from {stock}"
        changes.append(f"{embedding}; positions interpolated")
        if "patch_size" in known:
            options["patch_size"] = (patch, patch)
        elif patch != stock:
            raise UserError(
                f"timm cannot change the patches of a {type(network).__name__}: leave patch_size out."
            )
        if windowed:
            own = max(_side(m.window_size) for m in network.modules() if hasattr(m, "window_size"))
            options["window_size"] = _windows(grid, own, len(network.layers))
            changes.append(
                f"windows of {', '.join(map(str, options['window_size']))}, not {own}, in the stages"
            )
    elif size != network.pretrained_cfg["input_size"][-1]:
        changes.append(f"windows and biases for {size} pixels")  # it has these, but no patches
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", UserWarning
        )  # of torch, about how timm's interpolation indexes
        try:
            network.set_input_size(**options)
        except (AssertionError, RuntimeError, ValueError) as error:
            raise UserError(
                f"timm cannot make this network for {size} pixels ({error}): set image_size."
            ) from None
    return changes
