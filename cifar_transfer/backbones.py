"""Networks by name, their heads, and pretrained weights from torchvision, a file or an own checkpoint."""

import difflib
import hashlib
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_info
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision import models

from cifar_transfer.download import fetch
from cifar_transfer.errors import UserError

# Not yet: these two return the logits of auxiliary heads while training, and SqueezeNet's head is a convolution.
NAMES: list[str] = models.list_models(module=models, exclude=["googlenet", "inception_v3", "squeezenet*"])
OWN_PREFIX = "network."  # of the keys in our own checkpoints


class OnePixelConv2d(nn.Conv2d):
    """`nn.Conv2d` that leaves out, where its output is one pixel, the taps that only ever meet padding.

    At 32 x 32 pixels the last stage of a ResNet is one pixel large, and eight of nine taps of its 3 x 3 kernels are
    multiplied with zeros. The result is the same and the gradients of those taps are zeros as before, but forward and
    backward of ResNet18 take 0.37 s instead of 0.58 s (64 images of 32 pixels, one core of an AMD EPYC). It has
    `nn.Conv2d`'s parameters and state dict.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Convolve float [B, C, H, W]."""
        height, width = input.shape[-2:]
        top, left = (int(padding) for padding in self.padding)
        if not (self._one_pixel(height, 0) and self._one_pixel(width, 1)):
            return super().forward(input)
        weight = self.weight[:, :, top : top + height, left : left + width]
        return F.conv2d(input, weight, self.bias, groups=self.groups)

    def _one_pixel(self, size: int, axis: int) -> bool:
        kernel, padding, stride = self.kernel_size[axis], int(self.padding[axis]), self.stride[axis]
        return size + padding <= kernel and (size + 2 * padding - kernel) // stride == 0

    @classmethod
    def convert(cls, network: nn.Module) -> None:
        """Make the padded convolutions of a network ones of this class, in place."""
        for module in network.modules():
            padded = type(module) is nn.Conv2d and isinstance(module.padding, tuple) and max(module.padding) > 0
            if padded and module.padding_mode == "zeros" and module.dilation == (1, 1):
                module.__class__ = cls


def build(name: str, weights: str, num_classes: int, class_names: Sequence[str] | None = None) -> tuple[nn.Module, str]:
    """A network with a head for the data's classes.

    Args:
        name: A torchvision classification network, say "resnet18".
        weights: "DEFAULT" or another of torchvision's names for the network ("IMAGENET1K_V1"); "none"; or a file: a
            state dict (`.pth`, `.safetensors`; float16 is cast) or a checkpoint of this project.
        num_classes: Outputs of the head.
        class_names: What they stand for; the head of a checkpoint of ours is kept only when it tells these apart.

    Returns:
        The network, float32, and its head's name: `network.get_submodule(head)` is an `nn.Linear`.

    Raises:
        UserError: An unknown network or weights' name, a missing or unfit file, or a failed download.
    """
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, n=4)
        hint = f"did you mean {', '.join(near)}?" if near else f"take one of torchvision's, say {', '.join(NAMES[:4])}."
        raise UserError(f"There is no backbone {name!r}: {hint}")
    network = models.get_model(name, weights=None)
    head = head_name(network)
    old = network.get_submodule(head)
    assert isinstance(old, nn.Linear)
    network.set_submodule(head, nn.Linear(old.in_features, num_classes))
    OnePixelConv2d.convert(network)
    if weights.lower() != "none":
        state, trained_on = _read_weights(name, weights)
        if trained_on and class_names and list(trained_on) != list(class_names):
            state = _without_head(state, head, f"it tells apart {', '.join(trained_on[:3])}, ...")
        _load(network, state, head, weights)
    return network, head


def head_name(network: nn.Module) -> str:
    """The name of the last linear layer, which is the head of every network in `NAMES`."""
    return [name for name, module in network.named_modules() if isinstance(module, nn.Linear)][-1]


def _read_weights(name: str, weights: str) -> tuple[dict[str, Tensor], Sequence[str] | None]:
    known = {entry.name: entry for entry in models.get_model_weights(name)}
    if known:
        known["DEFAULT"] = models.get_model_weights(name).DEFAULT
    if weights in known:
        return read_state(_fetch(known[weights].url))
    path = Path(weights).expanduser()
    if not path.is_file():
        near = difflib.get_close_matches(weights, known, n=1)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise UserError(
            f"weights={weights!r} is neither a file nor a name of {name}'s weights. {hint}"
            f"Take one of {', '.join([*known, 'none'])}, or a path."
        )
    return read_state(path)


def _fetch(url: str) -> Path:
    """torchvision's file in torch's own cache, checked each time against the hash in its name, and fetched when absent.

    torch checks the hash only while it downloads, so that a file cut short would fail for ever.
    """
    path = Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[-1])
    match = re.search(r"-([0-9a-f]{8,})\.", path.name)
    assert match, f"{url} names no hash"
    if path.is_file() and not hashlib.sha256(path.read_bytes()).hexdigest().startswith(match[1]):
        rank_zero_info(f"{path} is damaged; it is downloaded again.")
        path.unlink()
    try:
        return fetch([url], path, digest=f"sha256:{match[1]}")
    except UserError as error:
        raise UserError(
            f"The pretrained weights are not on this machine: {error}. Three ways out: copy the file to {path}; name "
            f"another with --model.weights=FILE; or train without, --model.weights=none (make demo needs no download)."
        ) from None


def read_state(path: Path) -> tuple[dict[str, Tensor], Sequence[str] | None]:
    """Read a file of weights without running any code that it may hold.

    Args:
        path: A state dict (`.safetensors`, or as `torch.save` writes it) or a checkpoint of ours.

    Returns:
        The state dict by the network's own names, and the class names if it is a checkpoint of ours.

    Raises:
        UserError: The file is damaged, holds objects other than tensors, or is no state dict.
    """
    try:
        content: Any = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path} is not opened: it holds more than tensors, or is no file of weights.") from None
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise UserError(f"{path} cannot be read as weights ({error}): it may be cut short.") from None
    trained_on = None
    if isinstance(content, dict) and "pytorch-lightning_version" in content:
        trained_on = content.get("hyper_parameters", {}).get("class_names")
        content = {k.removeprefix(OWN_PREFIX): v for k, v in content["state_dict"].items() if k.startswith(OWN_PREFIX)}
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise UserError(f"{path} is no state dict: save one with torch.save(network.state_dict(), FILE).")
    return dict(content), trained_on


def _without_head(state: dict[str, Tensor], head: str, why: str) -> dict[str, Tensor]:
    rank_zero_info(f"The pretrained head is dropped: {why}")
    return {key: value for key, value in state.items() if not key.startswith(f"{head}.")}


def _load(network: nn.Module, state: dict[str, Tensor], head: str, weights: str) -> None:
    expected = network.state_dict()
    bias = f"{head}.bias"
    if bias in state and state[bias].shape != expected[bias].shape:
        state = _without_head(
            state, head, f"it has {len(state[bias])} outputs, the data {len(expected[bias])} classes."
        )
    backbone = {key for key in expected if not key.startswith(f"{head}.")}
    wrong = {
        "missing": backbone - state.keys(),
        "unknown": state.keys() - expected.keys(),
        "of another shape": {key for key in state.keys() & expected.keys() if state[key].shape != expected[key].shape},
    }
    if any(wrong.values()):
        found = "; ".join(f"{what}: {_some(keys)}" for what, keys in wrong.items() if keys)
        raise UserError(f"The weights {weights} do not fit the network. Keys {found}.")
    network.load_state_dict(state, strict=False)


def _some(keys: set[str], most: int = 5) -> str:
    return ", ".join(sorted(keys)[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")
