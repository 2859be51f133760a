"""Adapt networks made for images of 224 pixels to small ones of 32. What they have learned stays.

An adapted network does to a small image what the stock one does to its enlargement, without
computing at that size:

- A stem (the first convolution and max-pool) keeps the resolution.
- The classifier of VGG and AlexNet takes the smaller grid of features.
- A transformer gets smaller patches, positions for its grid, and windows that divide the grid.
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

# Side of the images in pixels, where a network must know it and nobody says it.
ASSUMED_SIDE = 32
# Patches along a side of the image that small images are cut into, at least. A Swin merges patches
# from stage to stage.
MIN_VIT_GRID = 8
MIN_SWIN_GRID = 16


def adapt(
    network: nn.Module,
    image_size: int | None,
    patch_size: int | None = None,
    small_images: bool = False,
) -> list[str]:
    """Adapt a network to the size of its images, in place. Whatever it has learned stays in it.

    Networks made for one size (ViT, Swin, BEiT, ...) are always brought to `image_size`, also a
    second time. Stems and classifiers are changed only with `small_images`, and only once.

    Args:
        network: A network of torchvision or timm with its weights.
        image_size: Side of the images in pixels, None if unknown.
        patch_size: Side of a transformer's patches in pixels. None keeps its own, or with
            `small_images` takes patches small enough for a grid of 8 x 8 (Swin: 16 x 16).
        small_images: Adapt stems, classifiers, patches and windows to small images.

    Returns:
        The changes, one sentence each.

    Raises:
        UserError: The network has no patches, they do not divide the image, or the network takes
            only images of its own size.
    """
    side = image_size or ASSUMED_SIDE
    if isinstance(network, models.VisionTransformer):
        return _adapt_vit(network, side, patch_size, small_images)
    if isinstance(network, models.SwinTransformer):
        return _adapt_swin(network, side, patch_size, small_images)
    if hasattr(network, "set_input_size"):
        return _adapt_timm_transformer(network, side, patch_size, small_images)
    if patch_size is not None:
        kind = type(network).__name__
        raise UserError(f"patch_size is for transformers: {kind} has no patches, leave it out.")
    _check_fixed_size(network, side)
    if not small_images:
        return []
    changes = adapt_stem(network)
    changes.extend(fold_pooling(network, side))
    return changes


def _check_fixed_size(network: nn.Module, side: int) -> None:
    """Raise `UserError` if a network of timm takes only images of another size."""
    config = getattr(network, "pretrained_cfg", {})
    if config.get("fixed_input_size") and config["input_size"][-1] != side:
        raise UserError(
            f"{config['architecture']} takes images of its own size only: set image_size=native."
        )


# Convolutional networks


def adapt_stem(network: nn.Module) -> list[str]:
    """Let the first layers of a network keep the resolution, which a small image has too little of.

    The first convolution gets stride 1. A max-pool that follows it becomes a `HalfMaxPool2d`.

    Returns:
        The changes. There are none if the stride is 1 already.

    Raises:
        UserError: The first convolution is of an unknown kind.
    """
    (name, convolution), (next_name, next_layer) = _first_two_layers(network)
    if not isinstance(convolution, nn.Conv2d) or convolution.stride[0] == 1:
        return []
    kernel_size = convolution.kernel_size[0]
    stride = convolution.stride[0]
    enlargement = stride
    first_tap = -_padding_before(name, convolution)
    changes = []
    # AlexNet keeps its pool: the stride of 4 of its convolution is enough to lose.
    if isinstance(next_layer, nn.MaxPool2d) and not isinstance(network, models.AlexNet):
        # A window of three covers the outputs 2i - 1, 2i and 2i + 1 of the convolution: the middle
        # one stands for them.
        middle = (_side(next_layer.kernel_size) - 1) // 2 - _side(next_layer.padding)
        first_tap += stride * middle
        enlargement = stride * _side(next_layer.stride)
        network.set_submodule(next_name, HalfMaxPool2d())
        changes.append(f"{next_name}: stride 1, half the reach")
    kernel = enlarged_kernel(convolution.weight.detach(), enlargement, first_tap)
    taps = kernel.shape[-1]
    network.set_submodule(name, _with_kernel(convolution, kernel, padding=taps // 2))
    changes.insert(
        0, f"{name}: {taps}x{taps} stride 1 from {kernel_size}x{kernel_size} stride {stride}"
    )
    return changes


def _first_two_layers(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the names and modules of the first two convolutions, max-pools or linear layers."""
    layers: list[tuple[str, nn.Module]] = []
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.MaxPool2d | nn.Linear):
            layers.append((name, module))
    return layers[:2]


def _padding_before(name: str, convolution: nn.Conv2d) -> int:
    """Return how many pixels the first convolution of a network pads with before the image."""
    if type(convolution) in (nn.Conv2d, DenseConv2d):
        return int(convolution.padding[0])
    if type(convolution).__name__ == "Conv2dSame":
        # timm has it for weights from TensorFlow, which pads less before the image than behind it.
        return max(0, convolution.kernel_size[0] - convolution.stride[0]) // 2
    kind = type(convolution).__name__
    raise UserError(f"small_images does not know the stem of this network, {name}, a {kind}.")


def fold_pooling(network: nn.Module, side: int) -> list[str]:
    """Fold the average pool of VGG or AlexNet into its first linear layer where it only repeats.

    They pool to a grid of 7 x 7 or 6 x 6. If the features of images with `side` pixels have a
    smaller grid, pooling repeats each of them, and the linear layer can add up its weights instead.

    Returns:
        The changes. There are none for other networks, or if the grid is not smaller.
    """
    if not isinstance(network, models.VGG | models.AlexNet):
        return []
    pooled_grid = _side(network.avgpool.output_size)
    index = _index_of_first_linear(network.classifier)
    linear = network.classifier[index]
    device = linear.weight.device
    with torch.no_grad():
        grid = network.features(torch.zeros(1, 3, side, side, device=device)).shape[-1]
    if grid >= pooled_grid:
        return []
    channels = linear.in_features // pooled_grid**2
    unit = torch.eye(grid**2, device=device).view(grid**2, 1, grid, grid)
    # float [grid², pooled_grid²]: where the pool repeats each value.
    repeats = F.adaptive_avg_pool2d(unit, pooled_grid).flatten(1)
    weight = linear.weight.detach().unflatten(1, (channels, pooled_grid**2))
    folded = nn.Linear(channels * grid**2, linear.out_features, device=device)
    folded.load_state_dict({"weight": (weight @ repeats.T).flatten(1), "bias": linear.bias})
    network.classifier[index] = folded
    network.avgpool = nn.AdaptiveAvgPool2d(grid)
    inputs = f"{folded.in_features:,} inputs, not {linear.in_features:,}"
    return [f"classifier.{index}: {inputs} (exact at {side} pixels)"]


def _index_of_first_linear(layers: nn.Sequential) -> int:
    """Return the position of the first linear layer."""
    for index, layer in enumerate(layers):
        if isinstance(layer, nn.Linear):
            return index
    raise ValueError("no linear layer")


# Transformers of torchvision


def _adapt_vit(
    network: models.VisionTransformer, side: int, patch_size: int | None, small_images: bool
) -> list[str]:
    """Bring a ViT of torchvision to images and patches of another size."""
    stock_patch = network.patch_size
    stock_grid = network.image_size // stock_patch
    patch = _choose_patch(stock_patch, side, patch_size, small_images, MIN_VIT_GRID)
    grid = _grid(side, patch)
    changes = []
    if patch != stock_patch:
        kernel = enlarged_patch(network.conv_proj.weight.detach(), patch)
        network.conv_proj = _with_kernel(network.conv_proj, kernel, stride=patch)
        changes.append(f"conv_proj: patches of {patch} pixels, resampled from {stock_patch}")
    if grid != stock_grid:
        key = "encoder.pos_embedding"
        state = {key: network.encoder.pos_embedding.detach()}
        positions = interpolate_embeddings(side, patch, state)[key]
        network.encoder.pos_embedding = nn.Parameter(positions)
        changes.append(f"{key}: {grid}x{grid}, interpolated from {stock_grid}x{stock_grid}")
    network.image_size = side
    network.patch_size = patch
    network.seq_length = grid**2 + 1
    return changes


def _adapt_swin(
    network: models.SwinTransformer, side: int, patch_size: int | None, small_images: bool
) -> list[str]:
    """Bring a Swin of torchvision to other patches, and with `small_images` to smaller windows."""
    convolution = network.features[0][0]
    stock_patch = convolution.stride[0]
    patch = _choose_patch(stock_patch, side, patch_size, small_images, MIN_SWIN_GRID)
    changes = []
    if patch != stock_patch:
        kernel = enlarged_patch(convolution.weight.detach(), patch)
        network.features[0][0] = _with_kernel(convolution, kernel, stride=patch)
        changes.append(f"features.0.0: patches of {patch} pixels, resampled from {stock_patch}")
    if small_images:
        attentions_by_stage = _attentions_by_stage(network)
        stock_window = attentions_by_stage[0][0].window_size[0]
        windows = _choose_windows(_grid(side, patch), stock_window, len(attentions_by_stage))
        for attentions, window in zip(attentions_by_stage, windows, strict=True):
            for attention in attentions:
                _set_window(attention, window)
        changes.append(_windows_sentence(windows, stock_window))
    return changes


def _attentions_by_stage(network: models.SwinTransformer) -> list[list[ShiftedWindowAttention]]:
    """Return the attention layers of each stage that has some."""
    attentions_by_stage = []
    for stage in network.features:
        attentions = [m for m in stage.modules() if isinstance(m, ShiftedWindowAttention)]
        if attentions:
            attentions_by_stage.append(attentions)
    return attentions_by_stage


def _set_window(attention: ShiftedWindowAttention, window: int) -> None:
    """Give an attention layer a smaller window, in place.

    Two positions at the same distance keep their bias. Distances beyond the new window are dropped.
    """
    stock_window = attention.window_size[0]
    if window == stock_window:
        return
    attention.window_size = [window, window]
    shift_size = []
    for shift in attention.shift_size:
        shift_size.append(window // 2 if shift else 0)
    attention.shift_size = shift_size
    attention.define_relative_position_index()
    # Of the stock distances from -(stock_window - 1) to stock_window - 1, those within the new
    # window.
    inner = slice(stock_window - window, stock_window + window - 1)
    if isinstance(attention, ShiftedWindowAttentionV2):
        # Swin v2 computes the biases from a table of coordinates, [1, distances, distances, 2].
        attention.relative_coords_table = attention.relative_coords_table[:, inner, inner]
        return
    distances = 2 * stock_window - 1
    table = attention.relative_position_bias_table.detach()
    table = table.unflatten(0, (distances, distances))  # [distances, distances, heads]
    biases = table[inner, inner].flatten(0, 1).clone()
    attention.relative_position_bias_table = nn.Parameter(biases)


# Transformers of timm


def _adapt_timm_transformer(
    network: Any, side: int, patch_size: int | None, small_images: bool
) -> list[str]:
    """Bring a network of timm to another size by timm's own resampling."""
    options: dict[str, Sequence[int]] = {}
    changes: list[str] = []
    if hasattr(getattr(network, "patch_embed", None), "img_size"):
        options, changes = _timm_patch_options(network, side, patch_size, small_images)
        if not changes:
            return []
    elif side != network.pretrained_cfg["input_size"][-1]:
        changes.append(f"windows and biases for {side} pixels")  # the network has no patches
    with warnings.catch_warnings():
        # torch warns of how timm's interpolation indexes.
        warnings.simplefilter("ignore", UserWarning)
        try:
            network.set_input_size(img_size=(side, side), **options)
        except (AssertionError, RuntimeError, ValueError) as error:
            raise UserError(
                f"timm cannot make this network for {side} pixels ({error}): set image_size."
            ) from None
    return changes


def _timm_patch_options(
    network: Any, side: int, patch_size: int | None, small_images: bool
) -> tuple[dict[str, Sequence[int]], list[str]]:
    """Return the options of timm's `set_input_size` for a network with patches, and the changes.

    There are no changes if the network has this size already.
    """
    parameters = inspect.signature(network.set_input_size).parameters
    # Where windows cannot be set, timm scales them with the image.
    has_windows = "window_size" in parameters and hasattr(network, "layers")
    min_grid = MIN_SWIN_GRID if has_windows else MIN_VIT_GRID
    stock_patch = _side(network.patch_embed.patch_size)
    patch = _choose_patch(stock_patch, side, patch_size, small_images, min_grid)
    grid = _grid(side, patch)
    if patch == stock_patch and side == _side(network.patch_embed.img_size):
        return {}, []
    options: dict[str, Sequence[int]] = {}
    changes = [
        f"patch_embed: {grid}x{grid} patches of {patch} pixels, resampled from {stock_patch}; "
        "positions interpolated"
    ]
    if "patch_size" in parameters:
        options["patch_size"] = (patch, patch)
    elif patch != stock_patch:
        kind = type(network).__name__
        raise UserError(f"timm cannot change the patches of a {kind}: leave patch_size out.")
    if has_windows:
        stock_window = _largest_timm_window(network)
        windows = _choose_windows(grid, stock_window, len(network.layers))
        options["window_size"] = windows
        changes.append(_windows_sentence(windows, stock_window))
    return options, changes


def _largest_timm_window(network: nn.Module) -> int:
    """Return the side of the largest window, in patches."""
    largest = 0
    for module in network.modules():
        if hasattr(module, "window_size"):
            largest = max(largest, _side(module.window_size))
    return largest


# Patches, windows and kernels


def _choose_patch(
    stock_patch: int, side: int, patch_size: int | None, small_images: bool, min_grid: int
) -> int:
    """Return the side of a patch in pixels: as given, or with `small_images` a smaller one."""
    if patch_size:
        return patch_size
    if not small_images:
        return stock_patch
    return min(stock_patch, max(1, side // min_grid))


def _grid(side: int, patch: int) -> int:
    """Return how many patches lie along a side of the image.

    Raises:
        UserError: The patches do not divide the image.
    """
    if side % patch:
        raise UserError(
            f"Patches of {patch} pixels do not divide images of {side}: choose another patch_size."
        )
    return side // patch


def _choose_windows(grid: int, stock_window: int, stages: int) -> list[int]:
    """Return for each stage the largest window, up to the stock one, that divides its grid."""
    windows = []
    for stage in range(stages):
        stage_grid = max(1, grid // 2**stage)
        window = stock_window
        while stage_grid % window:
            window -= 1
        windows.append(window)
    return windows


def _windows_sentence(windows: Sequence[int], stock_window: int) -> str:
    """Return the sentence about changed windows."""
    return f"windows of {', '.join(map(str, windows))}, not {stock_window}, in the stages"


def _side(size: Any) -> int:
    """Return the height of a size that torch or timm gives as one number or as several."""
    return size if isinstance(size, int) else size[0]


def _with_kernel(
    convolution: nn.Conv2d, kernel: Tensor, stride: int = 1, padding: int = 0
) -> nn.Conv2d:
    """Return a convolution with another kernel and the bias of the given one."""
    adapted = nn.Conv2d(
        convolution.in_channels,
        convolution.out_channels,
        kernel.shape[-1],
        stride,
        padding,
        bias=convolution.bias is not None,
        device=convolution.weight.device,
    )
    adapted.load_state_dict(convolution.state_dict() | {"weight": kernel})
    return adapted


def enlarged_kernel(kernel: Tensor, enlargement: int, first_tap: int) -> Tensor:
    """Return the kernel that does to an image what another one does to its enlargement.

    The returned kernel has stride 1, the other one the stride `enlargement`. If the matrix K is the
    other convolution and U the bilinear enlargement, the returned kernel is KU, because K(U(image))
    = (KU)(image).

    Args:
        kernel: float [O, I, K, K], for images enlarged `enlargement` times.
        enlargement: How many times the side of the image is enlarged.
        first_tap: Position of the first tap relative to the first pixel, in pixels of the
            enlargement: minus the padding.

    Returns:
        float [O, I, k, k] with k odd, to be used with a padding of k // 2. It is exact inside the
        image, except that taps that reach less than a quarter of a pixel beyond k use the outermost
        pixel.
    """
    # The positions of the taps, in pixels of the small image.
    taps = torch.arange(kernel.shape[-1], dtype=torch.double)
    positions = (taps + first_tap + 0.5) / enlargement - 0.5
    radius = max(1, math.ceil(float(positions.abs().max()) - 0.25))
    lower_pixels = positions.floor()
    upper_shares = positions - lower_pixels
    # double [K, k]: the share that each pixel of the small image has in what a tap sees.
    shares = positions.new_zeros(len(positions), 2 * radius + 1)
    _add_shares(shares, lower_pixels, 1 - upper_shares)
    _add_shares(shares, lower_pixels + 1, upper_shares)
    shares = shares.to(kernel)
    return torch.einsum("oikl,ka,lb->oiab", kernel, shares, shares)


def _add_shares(shares: Tensor, pixels: Tensor, amounts: Tensor) -> None:
    """Add to [K, k] the share of one pixel for each tap. Pixels beyond k become the outermost."""
    radius = shares.shape[1] // 2
    columns = pixels.clamp(-radius, radius).long() + radius
    shares.scatter_add_(1, columns[:, None], amounts[:, None])


def enlarged_patch(kernel: Tensor, patch: int) -> Tensor:
    """Return the kernel that does to a patch what another one does to its enlargement.

    This is `enlarged_kernel` for kernels that do not overlap, whose stride is K.

    Args:
        kernel: float [O, I, K, K].
        patch: Side of the small patch in pixels.

    Returns:
        float [O, I, patch, patch].
    """
    stock_patch = kernel.shape[-1]
    unit = torch.eye(patch * patch).view(patch * patch, 1, patch, patch)
    enlarged = F.interpolate(unit, size=(stock_patch, stock_patch), mode="bilinear", antialias=True)
    enlarge = enlarged.flatten(1).to(kernel)
    return (kernel.flatten(2) @ enlarge.T).unflatten(-1, (patch, patch))
