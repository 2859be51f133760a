"""What the program runs on: versions of the libraries, the processor or GPU, and its cores."""

import os
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


def cores() -> int:
    """Return how many cores this process may use, often fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or of the processor for any other device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor_name()


def processor_name() -> str:
    """Return the name of the processor with what it can do, such as "AMD EPYC (AVX512, bfloat16)".

    Makers sell processors of several generations under one name; how fast they are depends on the
    vectors that torch uses on them.
    """
    described = _described_processor()
    name = described.get("model name") or platform.processor() or platform.machine()
    abilities = [torch.backends.cpu.get_cpu_capability()]
    if "avx512_bf16" in described.get("flags", "").split():
        abilities.append("bfloat16")
    return f"{name} ({', '.join(abilities)})"


def _described_processor() -> dict[str, str]:
    """Return what Linux says of the last processor, by its keys; elsewhere nothing."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {}
    described = {}
    for line in lines:
        key, _, value = line.partition(":")
        described[key.strip()] = value.strip()
    return described
