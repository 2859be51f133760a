"""The package where it is installed, away from the project's folder: built, installed, and used."""

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
SHORT = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2"]


def output(command, folder, **environment):
    """Run a command in a folder, and return what it prints."""
    environment |= {"PIP_NO_INPUT": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    process = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, f"{command}\n{process.stdout}\n{process.stderr}"
    return process.stdout


def contents(folder):
    """Return the bytes of all files below a folder by their paths, but for compiled ones."""
    files = {}
    for path in folder.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            files[path.relative_to(folder)] = path.read_bytes()
    return files


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Two folders with nothing but the package: from the wheel, and from the sdist."""
    place = tmp_path_factory.mktemp("place")
    copy = place / "copy"
    for name in ("cifar_transfer", "configs", "tests"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    folders = []
    for kind in ("wheel", "sdist"):
        printed = output([sys.executable, "-c", BUILD.format(kind), place], copy)
        archive = place / printed.split()[-1]
        folder = place / f"from {kind}"
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
        output([*pip, "--no-build-isolation", "--target", folder, archive], place)
        folders.append(folder)
    return folders


@pytest.mark.slow
def test_wheel_and_sdist_install_the_same(installed):
    wheel, sdist = (contents(folder) for folder in installed)
    assert wheel.keys() == sdist.keys()
    for path in wheel:
        if path.name not in ("RECORD", "direct_url.json"):  # which name the archive
            assert wheel[path] == sdist[path], path


def test_the_whole_package_is_installed_and_no_tests(installed):
    package = contents(installed[0] / "cifar_transfer")
    recipes = contents(installed[0] / "cifar_transfer" / "configs")
    assert recipes == contents(ROOT / "configs")
    code = {path: content for path, content in package.items() if path.parts[0] != "configs"}
    assert code == contents(ROOT / "cifar_transfer")
    assert not (installed[0] / "tests").exists()


@pytest.mark.whole
def test_it_works_in_any_folder(installed, tmp_path):
    place = {"PYTHONPATH": str(installed[0])}
    where = [sys.executable, "-c", "import cifar_transfer; print(cifar_transfer.__file__)"]
    package = installed[0] / "cifar_transfer" / "__init__.py"
    assert output(where, tmp_path, **place) == f"{package}\n"

    script = [sys.executable, installed[0] / "bin" / "cifar-transfer"]
    printed = output([*script, "fit", "--config", "fast", *TINY, *SHORT], tmp_path, **place)
    assert "test accuracy" in printed
    config = (tmp_path / "lightning_logs" / "version_0" / "config.yaml").read_text()
    assert "schedule: linear" in config, "that of the recipe"

    Image.new("RGB", (40, 30)).save(tmp_path / "photo.png")
    module = [sys.executable, "-m", "cifar_transfer"]
    assert "photo.png" in output([*module, "predict", "photo.png"], tmp_path, **place)


@pytest.mark.whole
def test_the_demo_works_in_any_folder(installed, tmp_path):
    options = [option for option in TINY if not option.startswith("--model.weights")]
    command = [sys.executable, "-m", "cifar_transfer", "demo", *options, *SHORT]
    printed = output(command, tmp_path, PYTHONPATH=str(installed[0]))
    assert "from scratch, 12 epochs" in printed
    assert (tmp_path / "lightning_logs/demo/version_0/scratch/result.json").is_file()
    assert not (tmp_path / "lightning_logs/version_0").exists()
