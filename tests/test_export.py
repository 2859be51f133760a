"""Files for other programs give the checkpoint's logits, and say what they take and what their outputs stand for."""

import json
import sys
from dataclasses import replace

import pytest
import torch
import torchvision
from conftest import quiet_trainer
from safetensors import safe_open
from safetensors.torch import load_file

from cifar_transfer import TransferClassifier
from cifar_transfer.base.errors import UserError, one_sentence
from cifar_transfer.commands import export

NAMES = ["cat", "dog", "猫"]
MEAN, STD = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
SIZE, RESIZED = (24, 20), 32


def checkpoint(folder, **options):
    """A network with statistics of batch-norm, as after training, that has seen images of `SIZE`."""
    torch.manual_seed(0)
    model = TransferClassifier(
        **{"weights": "none", "class_names": NAMES, "normalize": [MEAN, STD]} | options
    )
    for _ in range(3):
        model.network(torch.randn(8, 3, 32, 32))
    model.geometry = replace(model.geometry, size=SIZE)
    trainer = quiet_trainer()
    trainer.strategy.connect(model)
    trainer.save_checkpoint(folder / "best.ckpt")
    return model.eval()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """For each of two networks its checkpoint, and itself."""
    made = {}
    for name in ("resnet18", "lenet5"):
        folder = tmp_path_factory.mktemp(name)
        made[name] = folder / "best.ckpt", checkpoint(folder, backbone=name, image_size=RESIZED)
    return made


def images(batch):
    return torch.rand(batch, 3, *SIZE, generator=torch.Generator().manual_seed(100 + batch))


def prepared(pixels):
    """What the network itself takes, by torch's own functions."""
    square = torchvision.transforms.functional.center_crop(pixels, min(SIZE))
    resized = torch.nn.functional.interpolate(
        square, size=(RESIZED, RESIZED), mode="bilinear", antialias=True
    )
    return torchvision.transforms.functional.normalize(resized, MEAN, STD)


def assert_agrees(model, network, inside):
    for batch in (1, 5):
        pixels = images(batch)
        with torch.no_grad():
            wanted = model(pixels)
            torch.testing.assert_close(
                network(pixels if inside else prepared(pixels)), wanted, atol=1e-4, rtol=1e-4
            )


def assert_tells(notes, inside):
    assert notes["class_names"] == NAMES
    assert (notes.get("mean"), notes.get("std")) == ((None, None) if inside else (MEAN, STD)), (
        "only if to be applied"
    )
    assert (
        "to cover 20 x 24 pixels; bilinear, antialiased), cut out the centre"
        in notes["preparation"]
    )
    assert notes["geometry"]["size"] == list(SIZE)
    assert ("Subtract the mean" in notes["preparation"]) != inside
    assert ("32 x 32" in notes["preparation"]) != inside
    height, width = SIZE if inside else (RESIZED, RESIZED)
    assert notes["input_shape"] == ["batch", 3, height, width]
    assert notes["input"].endswith(
        "in [0, 1]" if inside else "then (x - mean) / std of each channel"
    )


def parsed(metadata):
    """Metadata that hold JSON where they are no sentences."""
    return {
        key: json.loads(value) if value[0] in "[{" else value for key, value in metadata.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize(("name", "inside"), [("resnet18", True), ("lenet5", False)])
def test_onnx(trained, tmp_path, name, inside):
    onnxruntime = pytest.importorskip("onnxruntime")
    path, model = trained[name]
    difference = export.export(str(path), "onnx", str(tmp_path / "x.onnx"), preprocess=inside)
    assert 0 <= difference < 1e-4
    assert [file.name for file in tmp_path.iterdir()] == ["x.onnx"], "the weights are inside"
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx", providers=["CPUExecutionProvider"])
    assert_agrees(
        model, lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0]), inside
    )
    assert_tells(parsed(session.get_modelmeta().custom_metadata_map), inside)


@pytest.mark.parametrize(("name", "inside"), [("lenet5", True), ("resnet18", False)])
def test_torch_export(trained, tmp_path, name, inside):
    path, model = trained[name]
    export.export(str(path), "torch_export", str(tmp_path / "x.pt2"), preprocess=inside)
    extra = {export.NOTES: ""}
    program = torch.export.load(tmp_path / "x.pt2", extra_files=extra)
    assert_agrees(model, program.module(), inside)
    assert_tells(json.loads(extra[export.NOTES]), inside)


def test_a_file_of_anothers_beside_the_weights_stays(trained, tmp_path):
    (tmp_path / "x.json").write_text("mine")
    with pytest.raises(
        UserError, match=r"x\.json, which goes with .*x\.pth, is there already: name another --out"
    ):
        export.export(str(trained["resnet18"][0]), "state_dict", str(tmp_path / "x.pth"))
    assert (tmp_path / "x.json").read_text() == "mine"


def test_weights_fit_torchvisions_plain_network(trained, tmp_path, capsys):
    path, model = trained["resnet18"]
    export.export(str(path), "state_dict")
    network = torchvision.models.resnet18(num_classes=3)
    network.load_state_dict(torch.load(path.with_name("best.pth"), weights_only=True))
    assert_agrees(model, network.eval(), inside=False)
    assert_tells(json.loads(path.with_name("best.json").read_text()), inside=False)
    assert f"{path.with_name('best.pth')} (44." in capsys.readouterr().out

    export.export(str(path), "safetensors", str(tmp_path / "x.safetensors"))
    network = torchvision.models.resnet18(num_classes=3)
    network.load_state_dict(load_file(tmp_path / "x.safetensors"))
    assert_agrees(model, network.eval(), inside=False)
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert_tells(parsed(file.metadata()), inside=False)


def test_a_file_with_other_logits_is_not_kept(trained, tmp_path, monkeypatch, capsys):
    path, _ = trained["resnet18"]
    (tmp_path / "x.pth").write_bytes(b"of an earlier export")
    monkeypatch.setattr(
        export, "TOLERANCE", 0.0
    )  # the checkpoint multiplies matrices where torchvision convolves
    with pytest.raises(SystemExit, match=r"^2$"), one_sentence():
        export.export(str(path), "state_dict", str(tmp_path / "x.pth"))
    assert "gives other logits than the checkpoint" in capsys.readouterr().err
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"of an earlier export"]


def test_a_network_that_computes_no_numbers_is_not_exported(trained, tmp_path):
    path, _ = trained["lenet5"]
    broken = torch.load(path, weights_only=True)
    broken["state_dict"]["classifier.network.classifier.0.weight"] *= (
        1e4  # so that tanh gives 1 and -1
    )
    broken["state_dict"]["classifier.network.classifier.2.weight"].sign_().mul_(
        3e38
    )  # too large to be added up
    torch.save(broken, tmp_path / "best.ckpt")
    with pytest.raises(UserError, match="by nan"):
        export.export(str(tmp_path / "best.ckpt"), "state_dict")
    assert [file.name for file in tmp_path.iterdir()] == ["best.ckpt"]


def test_what_cannot_be_is_explained(trained, tmp_path, monkeypatch):
    path, _ = trained["resnet18"]
    with pytest.raises(UserError, match=r"best.ckpt cannot be the file .* ends in .pth"):
        export.export(str(path), "state_dict", str(path))
    with pytest.raises(UserError, match="cannot be written"):
        export.export(str(path), "state_dict", str(tmp_path / "gone" / "x.pth"))
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match="pip install onnxscript"):
        export.export(str(path), "onnx", str(tmp_path / "x.onnx"))
    checkpoint(tmp_path, backbone="resnet18", small_images=True)
    with pytest.raises(UserError, match=r"was adapted \(conv1: .*torch_export"):
        export.export(str(tmp_path / "best.ckpt"), "safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["best.ckpt"]
