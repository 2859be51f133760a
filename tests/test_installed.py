"""The package where it is installed, away from the project's folder: built, put into an empty folder, used."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_{}(sys.argv[1]))"


def done(command, folder, **environment):
    environment = (
        os.environ | {"PIP_NO_INPUT": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"} | environment
    )
    ended = subprocess.run(
        list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, f"{command}\n{ended.stdout}\n{ended.stderr}"
    return ended.stdout


def files(folder):
    found = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return {
        name: path.read_bytes() for name, path in found.items() if "__pycache__" not in name.parts
    }


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Two folders that nothing else is in: with the wheel, and with what the sdist builds."""
    place = tmp_path_factory.mktemp("place")
    for name in ("cifar_transfer", "configs", "tests"):
        shutil.copytree(
            ROOT / name, place / "copy" / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, place / "copy")
    builds = [[sys.executable, "-c", BUILD.format(kind), place] for kind in ("wheel", "sdist")]
    built = [done(build, place / "copy").split()[-1] for build in builds]
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
        "--target",
    ]
    for name in built:
        done([*pip, place / f"from {name}", place / name], place)
    return [place / f"from {name}" for name in built]


def test_wheel_and_sdist_install_the_same_and_all_of_it(installed):
    wheel, sdist = map(files, installed)
    recorded = {
        name: text for name, text in wheel.items() if name.name in ("RECORD", "direct_url.json")
    }
    assert wheel.keys() == sdist.keys()
    assert all(wheel[name] == sdist[name] for name in wheel.keys() - recorded.keys())
    package = {
        name.relative_to("cifar_transfer"): text
        for name, text in wheel.items()
        if name.parts[0] == "cifar_transfer"
    }
    recipes = {
        name.relative_to("configs"): text
        for name, text in package.items()
        if name.parts[0] == "configs"
    }
    assert recipes == files(ROOT / "configs")
    assert {name: text for name, text in package.items() if name.parts[0] != "configs"} == files(
        ROOT / "cifar_transfer"
    )
    assert not any(name.parts[0] == "tests" for name in wheel)


PYTHON, FEW = (
    [sys.executable, "-m"],
    [*TINY, "--trainer.max_epochs=1", "--trainer.limit_train_batches=2"],
)


@pytest.mark.slow
def test_it_is_used_from_a_folder_of_its_own(installed, tmp_path):
    place, program = (
        {"PYTHONPATH": str(installed[0])},
        [sys.executable, installed[0] / "bin" / "cifar-transfer"],
    )
    where = [sys.executable, "-c", "import cifar_transfer; print(cifar_transfer.__file__)"]
    assert done(where, tmp_path, **place) == f"{installed[0] / 'cifar_transfer' / '__init__.py'}\n"
    assert "test accuracy" in done([*program, "fit", "--config", "fast", *FEW], tmp_path, **place)
    config = (tmp_path / "lightning_logs" / "version_0" / "config.yaml").read_text()
    assert "schedule: linear" in config, "that of the recipe"
    Image.new("RGB", (40, 30)).save(tmp_path / "photo.png")
    assert "photo.png" in done(
        [*PYTHON, "cifar_transfer", "predict", "photo.png"], tmp_path, **place
    )


@pytest.mark.whole
def test_the_demo_runs_anywhere(installed, tmp_path):
    few = [option for option in FEW if not option.startswith("--model.weights")]
    said = done([*PYTHON, "cifar_transfer", "demo", *few], tmp_path, PYTHONPATH=str(installed[0]))
    assert "from scratch, 12 epochs" in said
