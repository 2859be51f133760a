"""Backbones, weights from everywhere, the network's input, and what it refuses."""

import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision import models

from cifar_transfer import TransferClassifier, backbones
from cifar_transfer.backbones import OnePixelConv2d
from cifar_transfer.classifier import STATISTICS
from cifar_transfer.errors import UserError

TINY = "shufflenet_v2_x0_5"


@pytest.fixture
def upstream():
    torch.manual_seed(1)
    return models.get_model(TINY, weights=None, num_classes=7)


def write(network, path, half=False):
    state = {k: v.half() if half and v.is_floating_point() else v for k, v in network.state_dict().items()}
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return path


def assert_backbone_arrived(model, network, exact=True):
    own = model.network.state_dict()
    for name, value in network.state_dict().items():
        if not name.startswith("fc."):
            expected = value if exact or not value.is_floating_point() else value.half().float()
            assert torch.equal(own[name], expected), name


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("half", [False, True])
def test_state_dicts_arrive_and_another_head_is_dropped(tmp_path, upstream, name, half, caplog):
    path = write(upstream, tmp_path / name, half)
    with caplog.at_level("INFO"):
        model = TransferClassifier(TINY, str(path), num_classes=4)
    assert_backbone_arrived(model, upstream, exact=not half)
    assert model.network.fc.weight.shape == (4, 1024)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert "head is dropped: it has 7 outputs, the data 4 classes" in caplog.text


def test_a_head_of_the_same_size_is_kept(tmp_path, upstream):
    model = TransferClassifier(TINY, str(write(upstream, tmp_path / "w.pth")), num_classes=7)
    assert torch.equal(model.network.fc.weight, upstream.fc.weight)


@pytest.mark.parametrize("same", [True, False])
def test_a_checkpoint_of_ours_is_a_pretraining(tmp_path, same):
    first = TransferClassifier(TINY, "none", class_names=["cat", "dog"])
    content = {
        "pytorch-lightning_version": "2",
        "state_dict": first.state_dict(),
        "hyper_parameters": dict(first.hparams),
    }
    torch.save(content, tmp_path / "run.ckpt")
    names = ["cat", "dog"] if same else ["cow", "pig"]
    second = TransferClassifier(TINY, str(tmp_path / "run.ckpt"), class_names=names)
    assert_backbone_arrived(second, first.network)
    assert torch.equal(second.network.fc.weight, first.network.fc.weight) == same, "kept for the same classes only"


def test_mismatches_name_the_keys(tmp_path, upstream):
    state = upstream.state_dict()
    del state["conv1.0.weight"]
    state["conv9.weight"] = torch.zeros(1)
    state["conv5.0.weight"] = torch.zeros(3)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"missing: conv1\.0\.weight.*unknown: conv9\.weight.*shape: conv5\.0\.weight"):
        TransferClassifier(TINY, str(tmp_path / "w.pth"))


class Bomb:
    def __reduce__(self):
        return open, ("bomb-went-off", "w")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps(Bomb()), "more than tensors"),
        (b"", "cannot be read|more than tensors"),
        (b"<html>404</html>", "more than tensors"),
    ],
)
def test_files_that_are_no_weights_are_refused_and_not_run(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "w.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        TransferClassifier(TINY, str(path))
    torch.save({"weight": Bomb()}, path)
    with pytest.raises(UserError, match="more than tensors"):
        TransferClassifier(TINY, str(path))
    assert not (tmp_path / "bomb-went-off").exists()


def test_a_file_cut_short_is_refused(tmp_path, upstream):
    path = write(upstream, tmp_path / "w.pth")
    path.write_bytes(path.read_bytes()[:10_000])
    with pytest.raises(UserError, match=r"cut short|more than tensors"):
        TransferClassifier(TINY, str(path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "resnet81"}, "resnet18"),
        ({"weights": "IMAGENET1K_V9"}, "IMAGENET1K_V1"),
        ({"weights": "gone/w.pth"}, "neither a file"),
        ({"num_classes": 3, "class_names": ["a", "b"]}, "the data have 2 classes"),
        ({"normalize": "imagnet"}, "imagenet"),
        ({"normalize": [[0.5, 0.5], [0.2, 0.2]]}, "two triples"),
        ({"normalize": [[0.5] * 3, [0.2, 0.0, 0.2]]}, "two triples"),
        ({"lr": 0.0}, "lr is 0"),
        ({"lr_factor": 1.0}, "lr_factor"),
        ({"image_size": 0}, "image_size"),
    ],
)
def test_mistakes_get_a_sentence(options, message):
    with pytest.raises(UserError, match=message) as error:
        TransferClassifier(**{"backbone": TINY, "weights": "none"} | options)
    assert "\n" not in str(error.value)


def test_no_network_names_the_three_ways_out(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    weights = models.get_model_weights(TINY).DEFAULT
    monkeypatch.setattr(type(weights), "url", f"http://127.0.0.1:9/{weights.url.rsplit('/', 1)[-1]}", raising=False)
    with pytest.raises(UserError, match=r"copy the file to .*--model\.weights=FILE.*--model\.weights=none"):
        TransferClassifier(TINY, "DEFAULT")


def test_weights_in_torchs_cache_are_used_and_a_damaged_file_is_not(tmp_path, monkeypatch, upstream):
    import hashlib

    folder = tmp_path / "checkpoints"
    folder.mkdir()
    content = write(upstream, tmp_path / "w.pth").read_bytes()
    url = f"http://127.0.0.1:9/tiny-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    cached = folder / url.rsplit("/", 1)[-1]
    cached.write_bytes(content)
    assert backbones._fetch(url) == cached
    cached.write_bytes(content[:-1])
    with pytest.raises(UserError, match="could not download"):
        backbones._fetch(url)


@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v3_small", "vgg11", "densenet121", "efficientnet_b0", "convnext_tiny"]
)
def test_the_head_is_found_in_every_family(name):
    network, head = backbones.build(name, "none", 5)
    assert network.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 5)
    assert network.get_submodule(head).out_features == 5


@pytest.mark.parametrize("size", [32, 64, 33, 17])
def test_one_pixel_convolutions_are_the_same_function(size):
    torch.manual_seed(0)
    plain = models.resnet18(num_classes=10)
    ours, _ = backbones.build("resnet18", "none", 10)
    ours.load_state_dict(plain.state_dict())
    assert sum(isinstance(m, OnePixelConv2d) for m in ours.modules()) == 17, "all but the three 1 x 1 shortcuts"
    images = torch.rand(4, 3, size, size)
    results = []
    for network in (plain.train(), ours.train()):
        logits = network(images)
        logits.square().sum().backward()
        results.append((logits, [p.grad for p in network.parameters()]))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-5)
    for one, other in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(one.abs().max()) + 1e-7)


def test_one_pixel_convolutions_do_less(monkeypatch):
    shapes = []
    conv = nn.functional.conv2d
    monkeypatch.setattr(
        "torch.nn.functional.conv2d", lambda x, w, *a, **k: shapes.append(w.shape) or conv(x, w, *a, **k)
    )
    OnePixelConv2d(4, 4, 3, padding=1)(torch.rand(1, 4, 1, 1))
    OnePixelConv2d(4, 4, 3, padding=1, stride=2)(torch.rand(1, 4, 2, 2))
    OnePixelConv2d(4, 4, 3, padding=1)(torch.rand(1, 4, 2, 2))
    assert shapes == [(4, 4, 1, 1), (4, 4, 2, 2), (4, 4, 3, 3)]


def test_input_is_resized_and_normalised():
    class Recorder(nn.Module):
        def forward(self, images):
            self.seen = images
            return images.new_zeros(len(images), 10)

    images = torch.rand(2, 3, 32, 32)
    for normalize in ("cifar10", "imagenet", [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]):
        model = TransferClassifier(TINY, "none", image_size=48, normalize=normalize)
        model.network = Recorder()
        model(images)
        mean, std = STATISTICS.get(normalize, normalize) if isinstance(normalize, str) else normalize
        resized = nn.functional.interpolate(images, size=(48, 48), mode="bilinear", antialias=True)
        for channel in range(3):
            expected = (resized[:, channel] - mean[channel]) / std[channel]
            torch.testing.assert_close(model.network.seen[:, channel], expected)


def test_real_weights_load(shared):
    for name, file in (("resnet18", "resnet18-tinyimagenet.pth"), ("mobilenet_v2", "mobilenet_v2-imagenet1k.pth")):
        path = shared / "weights" / file
        model = TransferClassifier(name, str(path))
        state = torch.load(path, weights_only=True)
        own = model.network.state_dict()
        arrived = [
            key
            for key in own
            if torch.equal(own[key], state[key].to(own[key].dtype).reshape(state[key].shape))
            if own[key].shape == state[key].shape
        ]
        assert {key for key in own if key not in arrived} == {f"{model.head}.weight", f"{model.head}.bias"}
