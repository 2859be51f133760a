"""What a figure was measured on: versions of the libraries, and the processor or GPU."""

import platform
from importlib.metadata import version
from pathlib import Path

import torch

from cifar_transfer import __version__

LIBRARIES = ("torch", "torchvision", "lightning")


def versions() -> dict[str, str]:
    """Return the versions of this package, of Python and of the libraries, by their names."""
    found = {"cifar_transfer": __version__, "python": platform.python_version()}
    for library in LIBRARIES:
        found[library] = version(library)
    return found


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or of the processor for any other device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor_name()


def processor_name() -> str:
    """Return the name of the processor, as Linux or else Python knows it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()
