"""What a checkpoint says of its network, and the check of it in files that may be anybody's."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args

from cifar_transfer.base.errors import UserError
from cifar_transfer.base.primitives import as_primitive
from cifar_transfer.data.geometry import LARGEST_SIDE, Fit, Geometry
from cifar_transfer.network.temperature import NO_TEMPERATURE, is_temperature

MAX_CLASSES = 10**6  # more would be a mistake, and fill the machine's memory
MAX_VALUE_CHARS = 80  # of a value in a message
NETWORK_KEY = "network"  # of the description in a checkpoint


@dataclass(frozen=True)
class NetworkDescription:
    """What a checkpoint says of its network: everything to build it, but not the weights.

    In contrast to `NetworkOptions`, nothing is left to be found out: "native" has become a number
    of pixels, and statistics are numbers. `temperature` divides the logits before the softmax.
    """

    backbone: str
    num_classes: int
    class_names: list[str] | None
    small_images: bool
    patch_size: int | None
    geometry: Geometry
    temperature: float = NO_TEMPERATURE

    @property
    def names_of_classes(self) -> list[str]:
        """Names of the classes in the order of the logits; "0", "1", ... if none were given."""
        if self.class_names:
            return list(self.class_names)
        return [str(label) for label in range(self.num_classes)]

    def to_primitives(self) -> dict[str, Any]:
        """Return the description as a checkpoint stores it."""
        return as_primitive(NETWORK_KEY, asdict(self))

    @classmethod
    def from_checkpoint(cls, checkpoint: Mapping[str, Any]) -> "NetworkDescription":
        """Return the description that a checkpoint holds, see `check_description`."""
        stored = checkpoint[NETWORK_KEY]
        geometry = Geometry.from_primitives(stored["geometry"])
        return cls(**{**stored, "geometry": geometry})


def check_description(path: Path, description: Mapping[str, Any]) -> None:
    """Refuse a description that `NetworkDescription.to_primitives` cannot have given.

    Args:
        path: The file that holds it, for the message.
        description: What the file says.

    Raises:
        UserError: A field is missing or unknown, or its value is impossible.
    """
    names = {field.name for field in fields(NetworkDescription)}
    if description.keys() != names:
        raise altered_file(path, NETWORK_KEY, sorted(map(str, description)))
    num_classes = description["num_classes"]
    if not is_int_between(num_classes, 2, MAX_CLASSES):
        raise altered_file(path, "num_classes", num_classes)
    class_names = description["class_names"]
    if class_names is not None and not _is_list(class_names, num_classes, str):
        raise altered_file(path, "class_names", class_names)
    if type(description["backbone"]) is not str:
        raise altered_file(path, "backbone", description["backbone"])
    if type(description["small_images"]) is not bool:
        raise altered_file(path, "small_images", description["small_images"])
    patch_size = description["patch_size"]
    if patch_size is not None and not _is_side(patch_size):
        raise altered_file(path, "patch_size", patch_size)
    if not _is_geometry(description["geometry"]):
        raise altered_file(path, "geometry", description["geometry"])
    if not is_temperature(description["temperature"]):
        raise altered_file(path, "temperature", description["temperature"])


def altered_file(path: Path, name: str, value: Any) -> UserError:
    """Return the error for a value that this program cannot have written.

    Args:
        path: The file.
        name: What the value is called in it.
        value: The value; its beginning is shown.
    """
    text = repr(value)
    if len(text) > MAX_VALUE_CHARS:
        text = f"{text[:MAX_VALUE_CHARS]}..."
    return UserError(f"{path} is damaged or was altered: its {name} cannot be {text}.")


def is_int_between(value: Any, lowest: float, highest: float) -> bool:
    """Return whether a value is an integer, and no bool, from `lowest` to `highest`."""
    return type(value) is int and lowest <= value <= highest


def _is_side(value: Any) -> bool:
    return is_int_between(value, 1, LARGEST_SIDE)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_list(value: Any, length: int, kind: type) -> bool:
    if not isinstance(value, list) or len(value) != length:
        return False
    return all(isinstance(item, kind) for item in value)


def _is_grey_range(value: Any) -> bool:
    if not isinstance(value, list) or len(value) != 2:
        return False
    return all(map(_is_number, value)) and value[0] < value[1]


def _is_geometry(value: Any) -> bool:
    """Return whether a value describes a `Geometry` with possible sizes and statistics."""
    if not isinstance(value, dict) or value.keys() != {field.name for field in fields(Geometry)}:
        return False
    if not _is_list(value["size"], 2, int) or not all(map(_is_side, value["size"])):
        return False
    if value["input_side"] is not None and not _is_side(value["input_side"]):
        return False
    for name in ("mean", "std"):
        channels = value[name]
        if not isinstance(channels, list) or len(channels) != 3:
            return False
        if not all(map(_is_number, channels)):
            return False
    if value["fit"] not in get_args(Fit):
        return False
    if value["grey_range"] is not None and not _is_grey_range(value["grey_range"]):
        return False
    return min(value["std"]) > 0
