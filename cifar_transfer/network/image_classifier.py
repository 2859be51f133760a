"""A network with all that is done to an image on its way into it: what prediction needs, without Lightning."""

from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from cifar_transfer.base.errors import UserError, check
from cifar_transfer.data.geometry import DEFAULT_SIDE, LARGEST_SIDE, Geometry, resize, statistics
from cifar_transfer.network import build

MOST_CLASSES = 10**6  # more would be a mistake, and take the memory of the machine
# Options that checkpoints of earlier versions may lack, as they were then.
ABSENT = {
    "class_names": None,
    "image_size": None,
    "normalize": None,
    "small_images": False,
    "patch_size": None,
}


class ImageNetwork(nn.Module):
    """A classifier of images, float [B, 3, H, W] in [0, 1], RGB.

    Attributes:
        options: Those of `TransferClassifier`, with what "native" and "weights" came to.
        network: The library's plain network.
        heads: Names of its layers that tell the classes apart, mostly one; all the rest is the backbone.
        changes: What was adapted to small images, in sentences.
        saved: Options of the run whose checkpoint gave the weights, else empty.
        geometry: How an image becomes the network's input.
        sized: Whether `geometry.size` is that of the images trained on; until training begins it is a guess.
    """

    network: nn.Module
    mean: Tensor
    std: Tensor

    def build_network(self, options: MutableMapping[str, Any]) -> None:
        """Build it, and its geometry as far as the options say it.

        Raises:
            UserError: An option out of its range, or as `network.build.build`.
        """
        self.options = options
        for name, value in (ABSENT | {"aux_weight": 0.0}).items():
            options.setdefault(name, value)
        most = f"1 to {LARGEST_SIDE} pixels"
        for name, fits, wanted in (
            (
                "image_size",
                lambda n: n in (None, "native") or 1 <= n <= LARGEST_SIDE,
                f"{most}, or native",
            ),
            ("patch_size", lambda n: n is None or 1 <= n <= LARGEST_SIDE, most),
            ("aux_weight", lambda x: 0 <= x <= 1000, "0 to 1000"),
        ):
            check(name, options[name], fits, wanted)
        built = build.build(
            *(options[name] for name in ("backbone", "weights", "num_classes", "class_names")),
            image_size=options["image_size"],
            small=options["small_images"],
            patch=options["patch_size"],
            auxiliary=options["aux_weight"] > 0,
        )
        self.network = built.network.to(
            memory_format=torch.channels_last
        )  # faster on CPUs and on GPUs' tensor cores
        self.heads, self.changes, self.saved = built.heads, built.changes, built.saved
        if options["normalize"] == "weights":
            if built.normalize is None:
                name = options["backbone"]
                raise UserError(
                    f"{name} has no published weights, so normalize=weights says nothing: name others."
                )
            options["normalize"] = built.normalize
        options["image_size"] = side = built.image_size
        self.weights_statistics = built.normalize or "imagenet"
        mean, std = statistics(options["normalize"] or self.weights_statistics)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        self.geometry = Geometry((side or DEFAULT_SIDE,) * 2, side, mean, std)
        self.sized = False

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.mean.device

    def take_size(self, checkpoint: Mapping[str, Any]) -> None:
        """Take up the size of a checkpoint's images; all else in a geometry follows from the options."""
        saved = Geometry.of(checkpoint)
        self.geometry = replace(self.geometry, size=saved.size, stretch=saved.stretch)
        self.sized = True

    def prepare(self, images: Tensor, side: int | None) -> Tensor:
        """Float images [B, 3, H, W] in [0, 1], RGB, as `network` takes them: of this side (None: as is), normalised."""
        return (resize(images, side, self.geometry.stretch) - self.mean) / self.std

    def forward(self, images: Tensor) -> Tensor:
        """Logits, float [B, num_classes], of images, float [B, 3, H, W] in [0, 1], RGB."""
        return self.all_logits(images, self.geometry.input_side)[0]

    @contextmanager
    def features(self) -> Iterator[list[Tensor]]:
        """A list to which each pass within adds what comes into the (first) head: float32 [B, D], on the CPU."""
        seen: list[Tensor] = []
        head = self.network.get_submodule(self.heads[0])
        hook = head.register_forward_pre_hook(
            lambda _, inputs: seen.append(inputs[0].flatten(1).float().cpu())
        )
        try:
            yield seen
        finally:
            hook.remove()

    def all_logits(self, images: Tensor, side: int | None) -> tuple[Tensor, ...]:
        """The main logits, and while auxiliary heads train, theirs, of images that are given at this side."""
        # bf16-true and 16-true convert the network, and lose too much in the images and the loss.
        images = self.prepare(images, side).to(next(self.network.parameters(), self.mean).dtype)
        logits = self.network(images.contiguous(memory_format=torch.channels_last))
        logits = logits if isinstance(logits, tuple) else (logits,)
        return tuple(each.to(torch.promote_types(each.dtype, torch.float32)) for each in logits)
