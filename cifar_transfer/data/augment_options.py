"""Options of the augmentation as they are given: a preset, and what differs from it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from cifar_transfer.base.errors import UserError
from cifar_transfer.base.primitives import as_primitive
from cifar_transfer.data.augment import PRESETS, Augmentation, PaddingMode
from cifar_transfer.data.geometry import Size
from cifar_transfer.data.resampling import Interpolation

PresetName = Literal["cifar", "photos", "none"]
MAX_SMALL_SIDE = 64  # pixels; larger images are photographs, as far as nothing else is known


@dataclass(frozen=True)
class Augment:
    """Options of the training augmentation; each that is None has the value of a preset.

    A value of 0 switches an operation off. "cifar" is the recipe of tutorials for CIFAR-10: a crop
    by 4 pixels, a flip, colours, a turn up to 15 degrees. "photos" cuts out 35 to 100 % of the
    image's area, flips, and changes the colours mildly. "none" does nothing.

    Args:
        padding: Pixels added on every side before a crop to the original size; the crop's place is
            uniform. Not used with `crop_scale`. (cifar: 4, photos: 0)
        flip: Probability of a left-right flip, in [0, 1]. (cifar: 0.5, photos: 0.5)
        brightness: The brightness factor is uniform in [max(0, 1 - brightness), 1 + brightness].
            (cifar: 0.2, photos: 0.2)
        contrast: The contrast factor is uniform in [max(0, 1 - contrast), 1 + contrast]. (cifar:
            0.2, photos: 0.2)
        saturation: The saturation factor is uniform in [max(0, 1 - saturation), 1 + saturation].
            (cifar: 0.2, photos: 0.2)
        hue: The hue moves by a fraction of the colour circle, uniform in [-hue, hue]; at most 0.5.
            (cifar: 0.1, photos: 0.0)
        degrees: The angle of rotation is uniform in [-degrees, degrees]. (cifar: 15.0, photos: 0.0)
        padding_mode: "constant" pads with black, "reflect" with the image mirrored at its edge.
            (cifar: constant, photos: constant)
        crop_scale: Bounds in (0, 1] of the share of the image's area that is cut out and enlarged
            to the image's size: torchvision's `RandomResizedCrop`. [1, 1] cuts nothing out, and
            crops by `padding`. (cifar: [1.0, 1.0], photos: [0.35, 1.0])
        crop_ratio: Bounds of the ratio of width to height of such a crop. (cifar: [0.75, 1.3333],
            photos: [0.75, 1.3333])
        translate: The image moves by up to this share of its height and of its width, in [0, 1].
            (cifar: 0.0, photos: 0.0)
        erase: Probability that a rectangle of 2 to 33 % of the image becomes black, in [0, 1]:
            torchvision's `RandomErasing`. (cifar: 0.0, photos: 0.0)
        interpolation: How pixels are read between others, "nearest" or "bilinear", which is slower.
            (cifar: nearest, photos: bilinear)
        preset: "cifar", "photos" or "none". None is "photos" for images of more than 64 pixels, and
            "cifar" for smaller ones.

    Raises:
        UserError: A value is out of its range.
    """

    padding: int | None = None
    flip: float | None = None
    brightness: float | None = None
    contrast: float | None = None
    saturation: float | None = None
    hue: float | None = None
    degrees: float | None = None
    padding_mode: PaddingMode | None = None
    crop_scale: list[float] | None = None
    crop_ratio: list[float] | None = None
    translate: float | None = None
    erase: float | None = None
    interpolation: Interpolation | None = None
    preset: PresetName | None = None

    def __post_init__(self) -> None:
        for option in fields(self):
            value = as_primitive(f"The augmentation's {option.name}", getattr(self, option.name))
            object.__setattr__(self, option.name, value)  # the way of a frozen dataclass
        if self.preset is not None and self.preset not in PRESETS:
            raise UserError(
                f"The augmentation's preset is {self.preset}; take {', '.join(PRESETS)}."
            )
        self.complete()  # which checks the values

    def complete(self) -> Augmentation:
        """Return the augmentation; without a preset it is that of small images."""
        options = asdict(PRESETS[self.preset or "cifar"])
        for name in options:
            value = getattr(self, name)
            if value is not None:
                options[name] = value
        return Augmentation(**options)

    def for_images(self, size: Size) -> "Augment":
        """Return the options with every value given, the preset by the size if none is given.

        Args:
            size: Height and width of the images in pixels.
        """
        preset = self.preset or preset_for(size)
        return self.on(asdict(Augment(preset=preset).complete()) | {"preset": preset})

    def on(self, others: Mapping[str, Any]) -> "Augment":
        """Return the options, with those of others where they are None."""
        options = asdict(self)
        for name, value in options.items():
            if value is None:
                options[name] = others.get(name)
        return Augment(**options)


def preset_for(size: Size) -> PresetName:
    """Return the name of the preset for images of a size, height and width in pixels."""
    if min(size) > MAX_SMALL_SIDE:
        return "photos"
    return "cifar"
