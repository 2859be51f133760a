"""A network together with what is done to an image on its way into it; needs no Lightning."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cifar_transfer.base.errors import UserError, check
from cifar_transfer.base.primitives import as_primitive
from cifar_transfer.data.geometry import (
    DEFAULT_SIDE,
    LARGEST_SIDE,
    Geometry,
    pixels,
    resize,
    statistics,
    to_float,
)
from cifar_transfer.network import build
from cifar_transfer.network.description import MAX_CLASSES, NETWORK_KEY, NetworkDescription
from cifar_transfer.network.weights import are_none


@dataclass(frozen=True)
class NetworkOptions:
    """Options of a network as they are given; `TransferClassifier` documents each.

    Raises:
        UserError: An option is out of its range or cannot be stored.
    """

    backbone: str = "resnet18"
    weights: str = "DEFAULT"
    num_classes: int | None = None
    class_names: list[str] | None = None
    image_size: int | Literal["native"] | None = None
    normalize: str | list[list[float]] | None = None
    small_images: bool = False
    patch_size: int | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            object.__setattr__(self, name, as_primitive(name, value))
        sides = f"1 to {LARGEST_SIDE} pixels"
        if self.num_classes is not None:
            _check_num_classes(self.num_classes)
        if self.image_size not in (None, "native"):
            check("image_size", self.image_size, _is_side, f"{sides}, or native")
        if self.patch_size is not None:
            check("patch_size", self.patch_size, _is_side, sides)
        if self.num_classes and self.class_names and len(self.class_names) != self.num_classes:
            raise UserError(
                f"num_classes is {self.num_classes}, but the data have {len(self.class_names)} "
                f"classes ({', '.join(self.class_names[:4])}, ...): leave num_classes out."
            )
        if self.class_names:
            _check_num_classes(len(self.class_names))

    @property
    def class_count(self) -> int:
        """Number of classes: `num_classes`, or as many as there are names, or 10."""
        if self.num_classes is not None:
            return self.num_classes
        if self.class_names:
            return len(self.class_names)
        return 10


def _is_side(value: Any) -> bool:
    return 1 <= value <= LARGEST_SIDE


def _check_num_classes(count: int) -> None:
    check("num_classes", count, lambda n: 2 <= n <= MAX_CLASSES, f"2 to {MAX_CLASSES:,}")


_checkpoint_description: ContextVar[NetworkDescription | None] = ContextVar(
    "checkpoint_description", default=None
)


@contextmanager
def built_from(description: NetworkDescription) -> Iterator[None]:
    """Build every `ImageClassifier` within as a checkpoint describes it, and untrained.

    A checkpoint holds all weights. So whoever loads it afterwards need not download pretrained
    ones, nor have the file that training began with. The options of the classifier stay as given.
    """
    token = _checkpoint_description.set(description)
    try:
        yield
    finally:
        _checkpoint_description.reset(token)


class ImageClassifier(nn.Module):
    """A network that takes images, float [B, 3, H, W] in [0, 1], RGB, and gives logits.

    Args:
        options: Options of the network; not used within `built_from`.

    Attributes:
        network: The library's plain network.
        description: What a checkpoint stores of the network beside its weights.
        heads: Names of the layers in `network` that tell the classes apart, mostly one. All the
            rest is the backbone.
        changes: What was adapted to small images, a sentence each.
        has_learned: Whether the network has weights that somebody has trained: not those that
            weights=none gives, until others are loaded.
        pretraining: Description of the network whose checkpoint gave the weights, or None if they
            come from elsewhere.

    Raises:
        UserError: Unknown names, unfit weights, or a size that the network cannot take.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, options: NetworkOptions) -> None:
        super().__init__()
        description = _checkpoint_description.get()
        if description is None:
            self._build_pretrained(options)
        else:
            self._build_untrained(description)

    @classmethod
    def from_description(cls, description: NetworkDescription) -> "ImageClassifier":
        """Build the untrained network that a checkpoint describes; nothing is fetched."""
        with built_from(description):
            return cls(NetworkOptions())

    def _build_pretrained(self, options: NetworkOptions) -> None:
        built = build.build_backbone(
            options.backbone,
            options.weights,
            options.class_count,
            options.class_names,
            image_size=options.image_size,
            small_images=options.small_images,
            patch_size=options.patch_size,
        )
        side = built.image_size
        size = side or DEFAULT_SIDE
        mean, std = statistics(_normalize(options, built))
        description = NetworkDescription(
            backbone=options.backbone,
            num_classes=options.class_count,
            class_names=options.class_names,
            small_images=options.small_images,
            patch_size=options.patch_size,
            geometry=Geometry((size, size), side, tuple(mean), tuple(std)),
        )
        self._take_network(built, description)
        self.has_learned = not are_none(options.weights)

    def _build_untrained(self, description: NetworkDescription) -> None:
        built = build.build_backbone(
            description.backbone,
            "none",
            description.num_classes,
            description.class_names,
            image_size=description.geometry.input_side,
            small_images=description.small_images,
            patch_size=description.patch_size,
        )
        self._take_network(built, description)
        self.has_learned = False

    def _take_network(self, built: build.Backbone, description: NetworkDescription) -> None:
        # Faster on CPUs, and on the tensor cores of GPUs.
        self.network = built.network.to(memory_format=torch.channels_last)
        self.heads = built.heads
        self.changes = built.changes
        self.pretraining: NetworkDescription | None = None
        if built.pretraining:
            self.pretraining = NetworkDescription.from_checkpoint({NETWORK_KEY: built.pretraining})
        self.description = description
        self.register_buffer("mean", _channels(description.geometry.mean), persistent=False)
        self.register_buffer("std", _channels(description.geometry.std), persistent=False)
        self.register_load_state_dict_post_hook(_note_weights)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self.description.num_classes

    @property
    def class_names(self) -> list[str]:
        """Names of the classes in the order of the logits; "0", "1", ... if none were given."""
        return self.description.names_of_classes

    @property
    def has_class_names(self) -> bool:
        """Whether the classes have names of their own."""
        return bool(self.description.class_names)

    def set_class_names(self, class_names: Sequence[str]) -> None:
        """Give the classes names, in the order of the logits."""
        names = as_primitive("class_names", list(class_names))
        self.description = replace(self.description, class_names=names)

    @property
    def backbone(self) -> str:
        """Name of the network, such as "resnet18"."""
        return self.description.backbone

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        return self.mean.device

    @property
    def geometry(self) -> Geometry:
        """How an image becomes the network's input."""
        return self.description.geometry

    def set_geometry(self, geometry: Geometry) -> None:
        """Replace the geometry, and with it the constants of the normalisation."""
        self.description = replace(self.description, geometry=geometry)
        self.mean.copy_(_channels(geometry.mean))
        self.std.copy_(_channels(geometry.std))

    @property
    def temperature(self) -> float:
        """Number that the logits are divided by before the softmax, fitted after training.

        `forward` gives the logits undivided, because losses and teachers take them so.
        """
        return self.description.temperature

    def set_temperature(self, temperature: float) -> None:
        """Replace the temperature; 1 leaves the probabilities as the network was trained."""
        self.description = replace(self.description, temperature=temperature)

    def prepare(self, images: Tensor, side: int | None) -> Tensor:
        """Return images as `network` takes them.

        Args:
            images: [B, 3, H, W], RGB: floats in [0, 1], or integers from 0 to 255.
            side: Side in pixels of the squares that they are resized to; None leaves their size.

        Returns:
            Float [B, 3, side, side], normalised.
        """
        return (resize(to_float(images), side) - self.mean) / self.std

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, float [B, num_classes], of images, [B, 3, H, W], RGB.

        Args:
            images: Floats in [0, 1]; integers, from 0 to 255, are divided by 255.
        """
        return self.logits_at(images, self.geometry.input_side)

    def logits_at(self, images: Tensor, side: int | None) -> Tensor:
        """Return logits of images that are resized to `side` pixels first, see `prepare`."""
        # The precisions bf16-true and 16-true convert the network. Images and loss stay in 32 bits.
        weights_dtype = next(self.network.parameters(), self.mean).dtype
        prepared = self.prepare(images, side).to(weights_dtype)
        logits = self.network(prepared.contiguous(memory_format=torch.channels_last))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def check_sides(self, sides: list[int | None]) -> None:
        """Run a black image of each side through the network.

        Args:
            sides: Sides in pixels; None stands for the size that images are decoded to.

        Raises:
            UserError: The network cannot take such images.
        """
        with self._evaluated():
            for side in dict.fromkeys(sides):
                self._check_side(side)

    @contextmanager
    def _evaluated(self) -> Iterator[None]:
        """Put the network in eval mode within the `with` block, and each module back after it."""
        modes = {module: module.training for module in self.modules()}
        self.eval()
        try:
            yield
        finally:
            for module, training in modes.items():
                module.training = training

    def needs_several_images(self, side: int | None) -> bool:
        """Return whether a batch of one image leaves batch-norm a single value a channel.

        In training such a batch has no deviation to divide by.

        Args:
            side: Side in pixels; None stands for the size that images are decoded to.
        """
        single_values: list[nn.Module] = []

        def look(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if inputs[0].numel() == inputs[0].shape[1]:
                single_values.append(layer)

        hooks = []
        for module in self.network.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                hooks.append(module.register_forward_pre_hook(look))
        try:
            with self._evaluated():
                self._check_side(side)
        finally:
            for hook in hooks:
                hook.remove()
        return bool(single_values)

    @torch.no_grad()
    def _check_side(self, side: int | None) -> None:
        image = torch.zeros(1, 3, *self.geometry.size, device=self.device)
        try:
            self.logits_at(image, side)
        except (RuntimeError, AssertionError) as error:
            size = side or pixels(self.geometry.size)
            reason = str(error).splitlines()[0]
            raise UserError(
                f"{self.backbone} cannot take images of {size} pixels ({reason}): "
                f"{build.size_hint(self.backbone)}"
            ) from None

    @contextmanager
    def features(self) -> Iterator[list[Tensor]]:
        """Record what comes into the first head in every forward pass within the `with` block.

        Yields:
            A list, to which each pass adds its features, float32 [B, D] on the CPU.
        """
        collected: list[Tensor] = []

        def collect(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            collected.append(inputs[0].flatten(1).float().cpu())

        head = self.network.get_submodule(self.heads[0])
        hook = head.register_forward_pre_hook(collect)
        try:
            yield collected
        finally:
            hook.remove()


def _note_weights(classifier: nn.Module, _: Any) -> None:
    """Note that weights were loaded, which somebody has trained."""
    assert isinstance(classifier, ImageClassifier)
    classifier.has_learned = True


def _normalize(options: NetworkOptions, built: build.Backbone) -> str | list[list[float]]:
    """Return the statistics that the options ask for, by name or as numbers."""
    if options.normalize == "weights" and built.normalize is None:
        raise UserError(
            f"{options.backbone} has no published weights, so normalize=weights says nothing: "
            f"name others."
        )
    if options.normalize in (None, "weights"):
        return built.normalize or "imagenet"
    return options.normalize


def _channels(values: Any) -> Tensor:
    """Return three numbers as a tensor [3, 1, 1], to be broadcast over images."""
    return torch.tensor(values).view(3, 1, 1)
