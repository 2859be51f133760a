"""Files for other programs give the checkpoint's logits, and say what they take."""

import json
import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
import torch
import torchvision
from conftest import quiet_trainer
from safetensors import safe_open
from safetensors.torch import load_file

from cifar_transfer import TransferClassifier
from cifar_transfer.base.errors import UserError, one_sentence
from cifar_transfer.commands.export import export
from cifar_transfer.inference import exporter
from cifar_transfer.inference.export_files import NOTES
from cifar_transfer.training.checkpoint_file import load_classifier

NAMES = ["cat", "dog", "猫"]
MEAN = [0.1, 0.2, 0.3]
STD = [0.4, 0.5, 0.6]
SIZE = (24, 20)
SIDE = 32


def save_checkpoint(folder, size=SIZE, **options):
    """Write the checkpoint of a network with statistics of batch-norm, as after training."""
    torch.manual_seed(0)
    defaults = {"weights": "none", "class_names": NAMES, "normalize": [MEAN, STD]}
    module = TransferClassifier(**defaults | options)
    classifier = module.classifier
    classifier.set_geometry(replace(classifier.geometry, size=size))
    side = classifier.geometry.input_side or SIDE
    with torch.no_grad():
        for _ in range(3):
            classifier.network(torch.randn(8, 3, side, side))
    trainer = quiet_trainer()
    trainer.strategy.connect(module)
    path = folder / "best.ckpt"
    trainer.save_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The checkpoints of two networks by their names."""
    checkpoints = {}
    for name in ("resnet18", "lenet5"):
        folder = tmp_path_factory.mktemp(name)
        checkpoints[name] = save_checkpoint(folder, backbone=name, image_size=SIDE)
    return checkpoints


def prepared(images):
    """Return images as the library's network takes them, by torch's and torchvision's functions."""
    square = torchvision.transforms.functional.center_crop(images, min(SIZE))
    resized = torch.nn.functional.interpolate(
        square, size=(SIDE, SIDE), mode="bilinear", antialias=True
    )
    return torchvision.transforms.functional.normalize(resized, MEAN, STD)


def assert_agrees(checkpoint, network, preprocess):
    """The network gives the logits of the checkpoint for any number of images."""
    classifier = load_classifier(checkpoint)
    for batch in (1, 5):
        images = torch.rand(batch, 3, *SIZE, generator=torch.Generator().manual_seed(100 + batch))
        with torch.no_grad():
            expected = classifier(images)
            logits = network(images if preprocess else prepared(images))
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def assert_describes(notes, preprocess):
    """The notes say all that has to be done to an image."""
    assert notes["class_names"] == NAMES
    assert notes["geometry"]["size"] == list(SIZE)
    words = notes["preparation"]
    cover = "to cover 20 x 24 pixels; bilinear, antialiased), cut out the centre"
    assert cover in words
    if preprocess:
        assert "mean" not in notes
        assert "std" not in notes
        assert "Subtract the mean" not in words
        assert "32 x 32" not in words
        assert notes["input_shape"] == ["batch", 3, *SIZE]
        assert notes["input"].endswith("in [0, 1]")
    else:
        assert notes["mean"] == MEAN
        assert notes["std"] == STD
        assert "Subtract the mean" in words
        assert "32 x 32" in words
        assert notes["input_shape"] == ["batch", 3, SIDE, SIDE]
        assert notes["input"].endswith("then (x - mean) / std of each channel")


def parsed(metadata):
    """Return notes from metadata, which hold JSON where they are no sentences."""
    notes = {}
    for key, text in metadata.items():
        notes[key] = json.loads(text) if text[0] in "[{" else text
    return notes


@pytest.mark.slow
@pytest.mark.parametrize(("name", "preprocess"), [("resnet18", True), ("lenet5", False)])
def test_onnx(trained, tmp_path, name, preprocess):
    onnxruntime = pytest.importorskip("onnxruntime")
    out = tmp_path / "x.onnx"
    difference = export(str(trained[name]), "onnx", str(out), preprocess=preprocess)
    assert 0 <= difference < 1e-4
    assert [file.name for file in tmp_path.iterdir()] == ["x.onnx"], "the weights are inside"
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])

    def network(images):
        return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

    assert_agrees(trained[name], network, preprocess)
    assert_describes(parsed(session.get_modelmeta().custom_metadata_map), preprocess)


@pytest.mark.parametrize("preprocess", [True, False])
def test_the_mirror_image_is_in_the_graph(trained, tmp_path, preprocess):
    out = tmp_path / "x.pt2"
    export(str(trained["lenet5"]), "torch_export", str(out), preprocess, mirrored=True)
    network = torch.export.load(out).module()
    classifier = load_classifier(trained["lenet5"])
    images = torch.rand(5, 3, *SIZE, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        shares = classifier(images).softmax(1) + classifier(images.flip(3)).softmax(1)
        logits = network(images if preprocess else prepared(images))
    torch.testing.assert_close(logits.exp(), shares / 2, atol=1e-5, rtol=0)
    assert (shares / 2 - classifier(images).softmax(1)).abs().max() > 1e-3
    with pytest.raises(UserError, match="state_dict holds weights alone, and no mirror image"):
        export(str(trained["lenet5"]), "state_dict", mirrored=True)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "preprocess"), [("lenet5", True), ("resnet18", False)])
def test_torch_export(trained, tmp_path, name, preprocess):
    out = tmp_path / "x.pt2"
    export(str(trained[name]), "torch_export", str(out), preprocess=preprocess)
    extra_files = {NOTES: ""}
    program = torch.export.load(out, extra_files=extra_files)
    assert_agrees(trained[name], program.module(), preprocess)
    assert_describes(json.loads(extra_files[NOTES]), preprocess)


def test_a_state_dict_fits_torchvisions_network(trained, capsys):
    checkpoint = trained["resnet18"]
    export(str(checkpoint), "state_dict")
    network = torchvision.models.resnet18(num_classes=3)
    network.load_state_dict(torch.load(checkpoint.with_name("best.pth"), weights_only=True))
    assert_agrees(checkpoint, network.eval(), preprocess=False)
    assert_describes(json.loads(checkpoint.with_name("best.json").read_text()), preprocess=False)
    assert f"{checkpoint.with_name('best.pth')} (44." in capsys.readouterr().out


def test_safetensors_fit_torchvisions_network(trained, tmp_path):
    out = tmp_path / "x.safetensors"
    export(str(trained["resnet18"]), "safetensors", str(out))
    network = torchvision.models.resnet18(num_classes=3)
    network.load_state_dict(load_file(out))
    assert_agrees(trained["resnet18"], network.eval(), preprocess=False)
    with safe_open(out, "pt") as file:
        assert_describes(parsed(file.metadata()), preprocess=False)


# What a user of the library does with an exported file, without this package.
USER = """
    import json
    import sys
    from pathlib import Path

    import torch
    from torchvision.transforms.functional import normalize

    name, folder = sys.argv[1:]
    notes = json.loads(Path(folder, "best.json").read_text())
    images = torch.load(Path(folder, "images.pt"))
    if name.startswith("timm/"):
        import timm

        network = timm.create_model(name.removeprefix("timm/"), num_classes=3)
    elif name in ("googlenet", "inception_v3"):
        from torchvision.models import get_model

        network = get_model(name, num_classes=3, aux_logits=False)
    else:
        from torchvision.models import get_model

        network = get_model(name, num_classes=3)
    network.load_state_dict(torch.load(Path(folder, "best.pth"), weights_only=True))
    with torch.no_grad():
        logits = network.eval()(normalize(images, notes["mean"], notes["std"]))
    torch.save(logits, Path(folder, "logits.pt"))
"""
FAMILIES = [
    ("googlenet", 64),  # whose network has a state beside its weights, as inception_v3's has
    ("squeezenet1_1", 64),
    pytest.param("alexnet", 64, marks=pytest.mark.whole),
    pytest.param("convnext_tiny", 64, marks=pytest.mark.whole),
    pytest.param("densenet121", 64, marks=pytest.mark.whole),
    pytest.param("efficientnet_b0", 64, marks=pytest.mark.whole),
    pytest.param("efficientnet_v2_s", 64, marks=pytest.mark.whole),
    pytest.param("inception_v3", 96, marks=pytest.mark.whole),
    pytest.param("maxvit_t", 224, marks=pytest.mark.whole),
    pytest.param("mnasnet0_5", 64, marks=pytest.mark.whole),
    pytest.param("mobilenet_v2", 64, marks=pytest.mark.whole),
    pytest.param("mobilenet_v3_small", 64, marks=pytest.mark.whole),
    pytest.param("regnet_x_400mf", 64, marks=pytest.mark.whole),
    pytest.param("regnet_y_400mf", 64, marks=pytest.mark.whole),
    pytest.param("resnet18", 64, marks=pytest.mark.whole),
    pytest.param("resnext50_32x4d", 64, marks=pytest.mark.whole),
    pytest.param("shufflenet_v2_x0_5", 64, marks=pytest.mark.whole),
    pytest.param("swin_t", 64, marks=pytest.mark.whole),
    pytest.param("swin_v2_t", 64, marks=pytest.mark.whole),
    pytest.param("vgg11", 64, marks=pytest.mark.whole),
    pytest.param("vit_b_32", 224, marks=pytest.mark.whole),
    pytest.param("wide_resnet50_2", 64, marks=pytest.mark.whole),
    pytest.param("timm/mobilenetv1_100", 64, marks=pytest.mark.whole),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "side"), FAMILIES)
def test_the_librarys_own_network_gives_the_same_logits_in_a_process_of_its_own(
    tmp_path, name, side
):
    if name.startswith("timm/"):
        pytest.importorskip("timm", reason="timm is an optional extra")
    checkpoint = save_checkpoint(tmp_path, (side, side), backbone=name, image_size=side)
    export(str(checkpoint), "state_dict")
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    torch.save(images, tmp_path / "images.pt")
    command = [sys.executable, "-c", textwrap.dedent(USER), name, str(tmp_path)]
    subprocess.run(command, check=True, cwd=tmp_path, env={"PATH": "", "OMP_NUM_THREADS": "1"})
    with torch.no_grad():
        expected = load_classifier(checkpoint)(images)
    logits = torch.load(tmp_path / "logits.pt", weights_only=True)
    largest = float(expected.abs().max())
    torch.testing.assert_close(logits, expected, atol=1e-4 * max(1, largest), rtol=0)


def test_statistics_take_over_what_inception_v3_does_to_its_input(tmp_path):
    """Pixels that its `transform_input` and the statistics make of an image are those of 0.5."""
    imagenet = [[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]
    checkpoint = save_checkpoint(
        tmp_path, (96, 96), backbone="inception_v3", image_size=96, normalize=imagenet
    )
    geometry = exporter.library_geometry(load_classifier(checkpoint))
    assert geometry.mean == pytest.approx([0.5] * 3)
    assert geometry.std == pytest.approx([0.5] * 3)


def test_a_file_of_somebody_else_beside_the_weights_stays(trained, tmp_path):
    (tmp_path / "x.json").write_text("mine")
    message = r"x\.json, which goes with .*x\.pth, is there already: name another --out"
    with pytest.raises(UserError, match=message):
        export(str(trained["resnet18"]), "state_dict", str(tmp_path / "x.pth"))
    assert (tmp_path / "x.json").read_text() == "mine"


def test_a_file_with_other_logits_is_not_kept(trained, tmp_path, monkeypatch, capsys):
    out = tmp_path / "x.pth"
    out.write_bytes(b"of an earlier export")
    # The checkpoint multiplies matrices where torchvision convolves.
    monkeypatch.setattr(exporter, "TOLERANCE", 0.0)
    with pytest.raises(SystemExit, match=r"^2$"), one_sentence():
        export(str(trained["resnet18"]), "state_dict", str(out))
    assert "gives other logits than the checkpoint" in capsys.readouterr().err
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"of an earlier export"]


def test_a_network_whose_logits_are_nan_is_not_exported(trained, tmp_path):
    broken = torch.load(trained["lenet5"], weights_only=True)
    head = "classifier.network.classifier"
    broken["state_dict"][f"{head}.0.weight"] *= 1e4  # so that tanh gives 1 and -1
    # Each is finite, but their sums are not.
    broken["state_dict"][f"{head}.2.weight"].sign_().mul_(3e38)
    torch.save(broken, tmp_path / "best.ckpt")
    with pytest.raises(UserError, match="by nan"):
        export(str(tmp_path / "best.ckpt"), "state_dict")
    assert [file.name for file in tmp_path.iterdir()] == ["best.ckpt"]


def test_a_place_that_a_file_cannot_have_is_refused(trained, tmp_path):
    checkpoint = str(trained["resnet18"])
    with pytest.raises(UserError, match=r"best.ckpt cannot be the file .* ends in .pth"):
        export(checkpoint, "state_dict", checkpoint)
    with pytest.raises(UserError, match="cannot be written"):
        export(checkpoint, "state_dict", str(tmp_path / "gone" / "x.pth"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torchscript", "--to torchscript is no format here: take torch_export, which PyTorch has"),
        ("TensorRT", "take onnx, which TensorRT reads"),
        ("keras", "the formats are state_dict, safetensors, onnx, torch_export"),
    ],
)
def test_another_format_is_answered_with_what_there_is_instead(trained, name, message):
    with pytest.raises(UserError, match=message):
        export(trained["lenet5"], name)


def test_a_package_that_is_missing_is_named(trained, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match="pip install onnxscript"):
        export(str(trained["resnet18"]), "onnx", str(tmp_path / "x.onnx"))
    assert list(tmp_path.iterdir()) == []


def test_weights_that_the_librarys_network_cannot_take_are_refused(tmp_path):
    checkpoint = save_checkpoint(tmp_path, backbone="resnet18", small_images=True)
    with pytest.raises(UserError, match=r"was adapted \(conv1: .*torch_export"):
        export(str(checkpoint), "safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["best.ckpt"]
