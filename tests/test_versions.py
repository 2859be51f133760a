"""The script that runs the tests on the oldest and the newest versions that are allowed."""

import subprocess
import sys
import tomllib
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def script():
    loader = SourceFileLoader("versions", str(ROOT / ".ci" / "versions"))
    module = module_from_spec(spec_from_loader("versions", loader))
    loader.exec_module(module)
    return module


def test_the_oldest_versions_are_the_lower_bounds_extras_too(script):
    pins = {Requirement(pin).name: Requirement(pin) for pin in script.oldest(PROJECT)}
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    bounded = [Requirement(line) for group in groups for line in group if ">=" in line]
    assert pins.keys() == {requirement.name for requirement in bounded}
    assert {"torch", "onnx", "timm", "pytest"} <= pins.keys()
    for requirement in bounded:
        (pin,) = pins[requirement.name].specifier
        assert pin.operator == "=="
        assert requirement.specifier.contains(pin.version)
        assert {f">={pin.version}"} <= {str(bound) for bound in requirement.specifier}
        assert pins[requirement.name].extras == requirement.extras


# The first version without the hole or the malice that is known of those before.
MENDED = {
    "torch": "2.10",
    "lightning": "2.6.4",
    "requests": "2.33",
    "tqdm": "4.66.3",
    "filelock": "3.20.3",
    "pillow": "12.3",
    "onnx": "1.21",
    "pytest": "9.0.3",
    "jsonargparse": "4.52",
}


@pytest.mark.parametrize("name", MENDED)
def test_versions_with_known_holes_are_not_allowed(script, name):
    (pin,) = (Requirement(pin) for pin in script.oldest(PROJECT) if Requirement(pin).name == name)
    (bound,) = pin.specifier
    assert Version(bound.version) >= Version(MENDED[name])


@pytest.mark.parametrize("arguments", [[], ["middle"]])
def test_without_a_word_it_says_how_it_is_used(arguments):
    done = subprocess.run(
        [sys.executable, ROOT / ".ci" / "versions", *arguments], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert ".ci/versions oldest|newest" in done.stderr
