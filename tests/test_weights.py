"""Weights in every publisher's format: each tensor arrives, and misfits are named."""

import json
import pickle
import re
from argparse import Namespace
from importlib.util import find_spec

import pytest
import torch
from conftest import quiet_trainer, write_images
from safetensors.torch import save_file
from torchvision import models

from cifar_transfer import ImageFolderDataModule, ShapesDataModule, TransferClassifier
from cifar_transfer.base.errors import UserError
from cifar_transfer.commands.fit import fit
from cifar_transfer.network import build, catalog
from cifar_transfer.network.build import with_head

TINY = "shufflenet_v2_x0_5"
VIT = "timm/vit_tiny_patch16_224"


@pytest.fixture
def upstream():
    torch.manual_seed(1)
    return models.get_model(TINY, weights=None, num_classes=7)


def write(network, path, half=False):
    state = {
        k: v.half() if half and v.is_floating_point() else v
        for k, v in network.state_dict().items()
    }
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return path


def assert_backbone_arrived(model, state, exact=True):
    """Every tensor of the model but the heads' is that of `state`, by the same name."""
    own = model.network.state_dict()
    heads = tuple(f"{head}." for head in model.heads)
    for name, value in own.items():
        if not name.startswith(heads):
            expected = (
                state[name]
                if exact or not value.is_floating_point()
                else state[name].half().float()
            )
            assert torch.equal(value, expected), name


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("half", [False, True])
def test_state_dicts_arrive_and_another_head_is_dropped(tmp_path, upstream, name, half, caplog):
    path = write(upstream, tmp_path / name, half)
    with caplog.at_level("INFO"):
        model = TransferClassifier(TINY, str(path), num_classes=4)
    assert_backbone_arrived(model, upstream.state_dict(), exact=not half)
    assert model.network.fc.weight.shape == (4, 1024)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert "head is dropped: it has 7 outputs, the data 4 classes" in caplog.text


def test_a_head_of_the_same_size_is_kept(tmp_path, upstream):
    model = TransferClassifier(TINY, str(write(upstream, tmp_path / "w.pth")), num_classes=7)
    assert torch.equal(model.network.fc.weight, upstream.fc.weight)


def own_checkpoint(model, path):
    """As a run writes it, as far as weights are concerned."""
    content = {
        "pytorch-lightning_version": "2",
        "state_dict": model.state_dict(),
        "hyper_parameters": dict(model.hparams),
        "input_size": [32, 32],
    }
    torch.save(content, path)
    return str(path)


@pytest.mark.parametrize("same", [True, False])
def test_a_checkpoint_of_ours_is_a_pretraining(tmp_path, same):
    first = TransferClassifier(TINY, "none", class_names=["cat", "dog"])
    names = ["cat", "dog"] if same else ["cow", "pig"]
    second = TransferClassifier(
        TINY, own_checkpoint(first, tmp_path / "run.ckpt"), class_names=names
    )
    assert_backbone_arrived(second, first.network.state_dict())
    assert torch.equal(second.network.fc.weight, first.network.fc.weight) == same, (
        "kept for the same classes only"
    )


def test_an_adapted_checkpoint_of_ours_is_taken_up_as_it_is(tmp_path):
    first = TransferClassifier("mobilenet_v3_small", "none", num_classes=3, small_images=True)
    path = own_checkpoint(first, tmp_path / "run.ckpt")
    again = TransferClassifier("mobilenet_v3_small", path, num_classes=5, small_images=True)
    assert_backbone_arrived(again, first.network.state_dict())
    with pytest.raises(UserError, match="was trained with small_images=true: ask for it here too"):
        TransferClassifier("mobilenet_v3_small", path)
    with pytest.raises(UserError, match="holds a mobilenet_v3_small, not a resnet18"):
        TransferClassifier("resnet18", path)


def test_images_unlike_those_of_the_checkpoint_are_told(tmp_path, caplog):
    path = own_checkpoint(
        TransferClassifier(TINY, "none", image_size=64, normalize="imagenet"), tmp_path / "run.ckpt"
    )
    data = ShapesDataModule(train_images=100)
    quiet_trainer(fast_dev_run=True).fit(TransferClassifier(TINY, path), data)
    assert (
        "come from images of 64 x 64 pixels, and the network now sees 32 x 32: set --model.image_size"
        in caplog.text
    )
    assert "come from images of other statistics: see --model.normalize" in caplog.text
    caplog.clear()
    same = TransferClassifier(TINY, path, image_size=64, normalize="imagenet")
    quiet_trainer(fast_dev_run=True).fit(same, data)
    assert "come from images" not in caplog.text


def test_an_adaptation_to_other_images_is_told(tmp_path):
    write_images(tmp_path / "train", 4, size=(96, 96))
    data = ImageFolderDataModule(str(tmp_path), val_fraction=0.5, batch_size=4)
    model = TransferClassifier("alexnet", "none", num_classes=2, small_images=True)
    with pytest.warns(
        UserWarning,
        match=r"adapted to images of 32 pixels, and these have 96 x 96: set --model\.image_size",
    ):
        quiet_trainer(fast_dev_run=True).fit(model, data)


def test_weights_alone_are_no_run_to_continue(tmp_path):
    path = own_checkpoint(TransferClassifier(TINY, "none"), tmp_path / "run.ckpt")
    torch.save(
        torch.load(path, weights_only=True) | {"global_step": 1}, path
    )  # as `save_checkpoint(weights_only=True)`
    with pytest.raises(
        UserError,
        match=r"holds weights alone, and no run to continue: begin with --model\.weights=FILE",
    ):
        fit(
            [
                f"--model.backbone={TINY}",
                "--data=ShapesDataModule",
                "--data.train_images=100",
                f"--ckpt_path={path}",
            ]
        )


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_auxiliary_heads_come_last(name):
    _, heads = with_head(name, 3, auxiliary=True, initialise=False)
    assert heads[0] == "fc"
    assert len(heads) > 1


def test_native_is_what_a_checkpoint_of_ours_was_trained_with(tmp_path):
    path = own_checkpoint(TransferClassifier(TINY, "none"), tmp_path / "a.ckpt")
    assert TransferClassifier(TINY, path, image_size="native").hparams["image_size"] == 32
    path = own_checkpoint(TransferClassifier(TINY, "none", image_size=48), tmp_path / "b.ckpt")
    assert TransferClassifier(TINY, path, image_size="native").hparams["image_size"] == 48


def test_a_transformer_of_ours_goes_from_one_size_to_another(tmp_path):
    torch.manual_seed(0)
    first = TransferClassifier("vit_b_32", "none", num_classes=3, image_size=64, patch_size=16)
    path = own_checkpoint(first, tmp_path / "run.ckpt")
    second = TransferClassifier("vit_b_32", path, num_classes=3, image_size=96, patch_size=16)
    assert second.network.encoder.pos_embedding.shape[1] == 6 * 6 + 1
    assert torch.equal(second.network.conv_proj.weight, first.network.conv_proj.weight)


def test_torchvisions_old_names_of_densenet(tmp_path):
    """Its files of DenseNet have `norm.1` where the network has `norm1`."""
    torch.manual_seed(0)
    state = models.densenet121().state_dict()
    published = {
        re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", key): v
        for key, v in state.items()
    }
    assert "features.denseblock1.denselayer1.norm.1.weight" in published
    published = {
        k: v for k, v in published.items() if "num_batches" not in k
    }  # older than that counter
    torch.save(published, tmp_path / "w.pth")
    assert_backbone_arrived(
        TransferClassifier("densenet121", str(tmp_path / "w.pth"), num_classes=3), state
    )


def test_torchvisions_old_names_and_larger_images_of_vit(tmp_path):
    """Its files of ViT have `mlp.linear_1` and no version; those of SWAG are for 384 pixels."""
    torch.manual_seed(0)
    network = models.vit_b_16(image_size=384)
    state = network.state_dict()
    published = {
        k.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): v
        for k, v in state.items()
    }
    assert published.keys() != state.keys()
    torch.save(published, tmp_path / "w.pth")
    model = TransferClassifier("vit_b_16", str(tmp_path / "w.pth"), num_classes=3, image_size=384)
    assert_backbone_arrived(model, state)
    model = TransferClassifier(
        "vit_b_16", str(tmp_path / "w.pth"), num_classes=3, image_size=32, small_images=True
    )
    assert model.network.encoder.pos_embedding.shape[1] == 8 * 8 + 1


def test_mnasnet_which_insists_on_a_version(tmp_path):
    torch.manual_seed(0)
    network = models.mnasnet0_5()
    torch.save(network.state_dict(), tmp_path / "w.pth")
    assert_backbone_arrived(
        TransferClassifier("mnasnet0_5", str(tmp_path / "w.pth")), network.state_dict()
    )
    save_file(network.state_dict(), tmp_path / "w.safetensors")  # which has no place for one
    assert_backbone_arrived(
        TransferClassifier("mnasnet0_5", str(tmp_path / "w.safetensors")), network.state_dict()
    )


@pytest.mark.parametrize("auxiliary", [0.0, 0.3])
def test_auxiliary_heads_are_loaded_or_left(tmp_path, auxiliary):
    network = models.googlenet(init_weights=False)
    torch.save(network.state_dict(), tmp_path / "w.pth")
    model = TransferClassifier(
        "googlenet", str(tmp_path / "w.pth"), num_classes=3, aux_weight=auxiliary
    )
    assert_backbone_arrived(model, network.state_dict())
    assert any("aux1.conv" in key for key in model.state_dict()) == (auxiliary > 0)


def test_a_head_without_bias_is_dropped(tmp_path):
    network = models.maxvit_t(num_classes=7)
    torch.save(network.state_dict(), tmp_path / "w.pth")
    model = TransferClassifier(
        "maxvit_t", str(tmp_path / "w.pth"), num_classes=3, image_size="native"
    )
    assert_backbone_arrived(model, network.state_dict())


def test_weights_of_another_network_are_refused(tmp_path, upstream):
    path = str(write(upstream, tmp_path / "w.pth"))
    for name in (
        "resnet18",
        *(["timm/test_vit", "timm/swin_tiny_patch4_window7_224"] if find_spec("timm") else []),
    ):
        with pytest.raises(
            UserError, match=r"do not fit the network. Keys missing: .*; unknown: "
        ) as error:
            TransferClassifier(name, path, num_classes=3)
        assert "\n" not in str(error.value)


def moco_v3(network, head, projector):
    """As facebookresearch/moco-v3 saves it: two encoders with projectors, a predictor, the optimizer."""
    encoder = {k: v for k, v in network.state_dict().items() if not k.startswith(f"{head}.")}
    encoder |= {f"{head}.{i}.weight": torch.randn(projector, projector) for i in (0, 3, 6)}
    state = {f"module.base_encoder.{k}": v for k, v in encoder.items()}
    state |= {f"module.momentum_encoder.{k}": torch.zeros_like(v) for k, v in encoder.items()}
    state["module.predictor.0.weight"] = torch.randn(projector, projector)
    optimizer = torch.optim.SGD(network.parameters(), 0.1).state_dict()
    return {
        "epoch": 300,
        "arch": "x",
        "state_dict": state,
        "optimizer": optimizer,
        "scaler": {"scale": 65536.0},
    }


@pytest.mark.parametrize(
    ("name", "head"),
    [("resnet50", "fc"), pytest.param("timm/vit_base_patch16_224", "head", id="vit_base")],
)
def test_moco_v3(tmp_path, name, head):
    if name.startswith("timm/"):
        pytest.importorskip("timm", reason="timm is an optional extra")
    torch.manual_seed(0)
    network = build.stock(name)
    torch.save(moco_v3(network, head, 16), tmp_path / "r-50-300ep.pth.tar")
    model = TransferClassifier(
        name, str(tmp_path / "r-50-300ep.pth.tar"), num_classes=3, image_size=224
    )
    assert_backbone_arrived(model, network.state_dict())


@pytest.mark.parametrize("publisher", ["timm", "deit", "dino", "lightning", "ddp"])
def test_publishers_wrappings(tmp_path, publisher):
    pytest.importorskip("timm", reason="timm is an optional extra")
    torch.manual_seed(0)
    network = build.stock(VIT)
    state = network.state_dict()
    content = {
        "timm": state,
        "deit": {"model": state, "args": Namespace(lr=0.1), "epoch": 3},
        "dino": {
            "student": {f"module.backbone.{k}": torch.zeros_like(v) for k, v in state.items()},
            "teacher": {f"backbone.{k}": v for k, v in state.items()}
            | {"head.mlp.0.weight": torch.zeros(3, 3)},
            "epoch": 3,
        },
        "lightning": {
            "state_dict": {f"model.{k}": v for k, v in state.items()},
            "pytorch-lightning_version": "2.5",
        },
        "ddp": {"state_dict": {f"module.{k}": v for k, v in state.items()}},
    }[publisher]
    torch.save(content, tmp_path / "w.pth")
    model = TransferClassifier(VIT, str(tmp_path / "w.pth"), num_classes=3, image_size=224)
    assert_backbone_arrived(model, state)


@pytest.mark.slow
def test_microsofts_own_files_of_swin_and_beit(tmp_path):
    """With tables of indices, and Swin's mergings and head by other names: timm converts them."""
    pytest.importorskip("timm", reason="timm is an optional extra")
    torch.manual_seed(0)
    name = "timm/swin_tiny_patch4_window7_224"
    state = build.stock(name).state_dict()
    published = {}
    for key, value in state.items():
        key = key.replace("head.fc.", "head.")
        found = re.match(
            r"layers\.(\d)\.downsample\.(.*)", key
        )  # a stage ends with it there, and begins with it in timm
        published[f"layers.{int(found[1]) - 1}.downsample.{found[2]}" if found else key] = value
    published["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(
        49, 49, dtype=torch.long
    )
    torch.save({"model": published}, tmp_path / "swin.pth")
    model = TransferClassifier(name, str(tmp_path / "swin.pth"), num_classes=3, image_size=224)
    assert_backbone_arrived(model, state)

    name = "timm/beit_base_patch16_224"
    state = build.stock(name).state_dict()
    published = state | {
        "blocks.0.attn.relative_position_index": torch.zeros(197, 197, dtype=torch.long)
    }
    torch.save({"model": published}, tmp_path / "beit.pth")
    model = TransferClassifier(name, str(tmp_path / "beit.pth"), num_classes=3, image_size=224)
    assert_backbone_arrived(model, state)
    table = "blocks.0.attn.relative_position_bias_table"
    small = TransferClassifier(
        name, str(tmp_path / "beit.pth"), num_classes=3, image_size=32, small_images=True
    )
    assert small.network.state_dict()[table].shape[0] == (2 * 8 - 1) ** 2 + 3, (
        "resampled to 8 x 8 patches"
    )


def test_mismatches_name_the_keys(tmp_path, upstream):
    state = upstream.state_dict()
    del state["conv1.0.weight"]
    state["conv9.weight"] = torch.zeros(1)
    state["conv5.0.weight"] = torch.zeros(3)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(
        UserError,
        match=r"missing: conv1\.0\.weight.*unknown: conv9\.weight.*shape: conv5\.0\.weight",
    ):
        TransferClassifier(TINY, str(tmp_path / "w.pth"))


def test_values_that_are_no_numbers_are_refused(tmp_path, upstream):
    state = upstream.state_dict()
    state["conv5.0.weight"][0, 0] = float("nan")
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"NaN or infinite, in conv5\.0\.weight"):
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


def test_real_weights_load(shared):
    for name, file in (
        ("resnet18", "resnet18-tinyimagenet.pth"),
        ("mobilenet_v2", "mobilenet_v2-imagenet1k.pth"),
        ("resnet50", "resnet50-imagenet1k.pth"),
    ):
        path = shared / "weights" / file
        model = TransferClassifier(name, str(path))
        state = torch.load(path, weights_only=True)
        own = model.network.state_dict()
        different = {
            key
            for key in own
            if own[key].shape != state[key].shape or not own[key].equal(state[key].float())
        }
        different = {key for key in different if "num_batches" not in key}
        assert different == {
            f"{head}.{part}" for head in model.heads for part in ("weight", "bias")
        }


def test_catalogue_is_json_and_says_where_weights_are():
    entry = next(iter(catalog.weights("resnet18").values()))
    assert entry.url.endswith("resnet18-f37072fd.pth")
    assert (entry.native, entry.parameters, entry.top1) == (224, 11689512, 30.242)
    json.dumps(entry.__dict__)
