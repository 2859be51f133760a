"""What the README says can be done, is done."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import quiet_trainer
from lightning import Trainer
from PIL import Image

import cifar_transfer
from cifar_transfer.export import export
from cifar_transfer.training.cli import FitCLI

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_the_python_examples_run(tmp_path, monkeypatch):
    train, phases, predict = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    tiny = {"train_images": 100, "test_images": 20}
    monkeypatch.setattr(cifar_transfer, "CIFAR10DataModule", lambda root: cifar_transfer.ShapesDataModule(**tiny))
    train = train.replace('"resnet18"', '"shufflenet_v2_x0_5", "none"').replace("max_epochs=40", "max_epochs=6")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(train, names)
    assert isinstance(names["trainer"], Trainer)
    assert "test/acc" in names["trainer"].callback_metrics
    exec(phases, names)
    assert [phase.epoch for phase in names["freeze"].phases] == [None, 2, 4]
    for name in re.findall(r'"(\w+\.jpg)"', predict):
        Image.new("RGB", (40, 30)).save(name)
    exec(predict.replace("best.ckpt", Path(names["trainer"].checkpoint_callback.best_model_path).name), names)
    assert {name for name, _ in names["likely"]} <= set(names["data"].class_names)
    assert [len(row) for row in names["likeliest"]] == [1, 1]


def test_the_lines_for_onnxruntime_give_what_predict_gives(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime", reason="onnxruntime is an optional extra")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = cifar_transfer.TransferClassifier("shufflenet_v2_x0_5", "none", class_names=["cat", "dog", "猫"])
    for _ in range(3):
        model.network(torch.randn(8, 3, 32, 48))  # for the statistics of batch-norm
    model.network.fc.weight.data *= 10
    model.geometry = replace(model.geometry, size=(32, 48))
    trainer = quiet_trainer()
    trainer.strategy.connect(model)
    trainer.save_checkpoint("best.ckpt")
    export("best.ckpt", "onnx")
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((70, 97), Image.Resampling.BICUBIC).save("photo.jpg", exif=exif)
    (lines,) = re.findall(r"```py\n(import json, numpy.*?)```", README, re.DOTALL)
    names = {}
    exec(lines, names)
    expected = cifar_transfer.Classifier.load("best.ckpt", "cpu").predict("photo.jpg")
    assert [name for name, _ in names["likely"]] == [name for name, _ in expected]
    assert [share for _, share in names["likely"]] == pytest.approx([share for _, share in expected], abs=1e-4)
    assert expected[0][1] - expected[-1][1] > 0.1


def test_every_option_exists(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["fit"])
    options = set(re.findall(r"(--(?:model|data|trainer|freeze|report)\.[a-z_.0-9]+)=", README))
    assert len(options) > 10
    (tmp_path / "train" / "a").mkdir(parents=True)
    (tmp_path / "train" / "b").mkdir()
    own = ["--data=ImageFolderDataModule", "--data.root=.", "--model.weights=none", "--trainer.accelerator=cpu"]
    known = set()
    for arguments in (own, ["--model.weights=none", "--trainer.accelerator=cpu"]):
        config = FitCLI(arguments).config.as_dict()
        known |= {f"--data.{name}" for name in config["data"]["init_args"]}
        known |= {f"--{part}.{name}" for part in ("model", "trainer", "freeze", "report") for name in config[part]}
    assert options <= known


def test_every_recipe_is_valid_and_promises_a_result(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["fit"])
    recipes = sorted((ROOT / "configs").glob("*.yaml"))
    assert recipes
    for recipe in recipes:
        header = recipe.read_text().split("\n\n")[0]
        assert all(line.startswith("#") for line in header.splitlines()), recipe.name
        assert re.search(r"\d %|Not measured:", header), f"{recipe.name} promises no result"
        FitCLI(["--config", str(recipe), "--model.weights=none"])
