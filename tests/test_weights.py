"""Weights in every publisher's format: each tensor arrives, and misfits are named."""

import json
import pickle
import re
from argparse import Namespace
from importlib.util import find_spec

import pytest
import torch
from conftest import Program, quiet_trainer, write_images
from safetensors.torch import save_file
from torchvision import models

from cifar_transfer import ImageFolderDataModule, ShapesDataModule, TransferClassifier
from cifar_transfer.base.errors import UserError
from cifar_transfer.commands.fit import fit
from cifar_transfer.network import catalog
from cifar_transfer.network.build import build_stock

TINY = "shufflenet_v2_x0_5"
VIT = "timm/vit_tiny_patch16_224"


@pytest.fixture
def upstream():
    """Return a network of seven classes, as somebody else has trained it."""
    torch.manual_seed(1)
    return models.get_model(TINY, weights=None, num_classes=7)


def save_weights(network, path, half=False):
    """Save a state dict in the format that the ending of the name says."""
    state = network.state_dict()
    if half:
        state = in_half_precision(state)
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return str(path)


def in_half_precision(state):
    halves = {}
    for name, value in state.items():
        halves[name] = value.half() if value.is_floating_point() else value
    return halves


def assert_backbone_arrived(model, state):
    """Every tensor of the model but its heads' is the one of that name in `state`."""
    heads = tuple(f"{head}." for head in model.heads)
    names = [name for name in model.network.state_dict() if not name.startswith(heads)]
    assert names
    for name in names:
        value = model.network.state_dict()[name]
        assert torch.equal(value, state[name].to(value.dtype)), name


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("half", [False, True])
def test_state_dicts_arrive_and_another_head_is_dropped(tmp_path, upstream, name, half, caplog):
    path = save_weights(upstream, tmp_path / name, half)
    with caplog.at_level("INFO"):
        model = TransferClassifier(TINY, path, num_classes=4)
    state = upstream.state_dict()
    assert_backbone_arrived(model, in_half_precision(state) if half else state)
    assert model.network.fc.weight.shape == (4, 1024)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert "head is dropped: it has 7 outputs, the data 4 classes" in caplog.text


def test_a_head_of_the_same_size_is_kept(tmp_path, upstream):
    model = TransferClassifier(TINY, save_weights(upstream, tmp_path / "w.pth"), num_classes=7)
    assert torch.equal(model.network.fc.weight, upstream.fc.weight)


def save_own_checkpoint(model, path):
    """Save what a run writes, as far as weights are concerned."""
    checkpoint = {
        "pytorch-lightning_version": "2",
        "state_dict": model.state_dict(),
        "hyper_parameters": dict(model.hparams),
        "network": model.classifier.description.to_primitives(),
    }
    torch.save(checkpoint, path)
    return str(path)


@pytest.mark.parametrize("names", [["cat", "dog"], ["cow", "pig"]])
def test_a_checkpoint_of_ours_is_a_pretraining(tmp_path, names):
    first = TransferClassifier(TINY, "none", class_names=["cat", "dog"])
    path = save_own_checkpoint(first, tmp_path / "run.ckpt")
    second = TransferClassifier(TINY, path, class_names=names)
    assert_backbone_arrived(second, first.network.state_dict())
    is_kept = torch.equal(second.network.fc.weight, first.network.fc.weight)
    assert is_kept == (names == ["cat", "dog"]), "the head tells the same classes apart"


def test_an_adapted_checkpoint_of_ours_is_taken_up_as_it_is(tmp_path):
    first = TransferClassifier("mobilenet_v3_small", "none", num_classes=3, small_images=True)
    path = save_own_checkpoint(first, tmp_path / "run.ckpt")
    again = TransferClassifier("mobilenet_v3_small", path, num_classes=5, small_images=True)
    assert_backbone_arrived(again, first.network.state_dict())
    with pytest.raises(UserError, match="was trained with small_images=true: ask for it here too"):
        TransferClassifier("mobilenet_v3_small", path)
    with pytest.raises(UserError, match="holds a mobilenet_v3_small, not a resnet18"):
        TransferClassifier("resnet18", path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("geometry", {"size": [32, 32]}),
        ("geometry", None),
        ("num_classes", "two"),
        ("backbone", 7),
        ("class_names", [1, 2]),
        ("patch_size", "large"),
    ],
)
def test_an_altered_description_of_a_checkpoint_of_ours_is_refused(tmp_path, field, value):
    path = save_own_checkpoint(TransferClassifier(TINY, "none"), tmp_path / "run.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["network"][field] = value
    torch.save(checkpoint, path)
    message = rf"run\.ckpt is damaged or was altered: its {field} cannot be"
    with pytest.raises(UserError, match=message):
        TransferClassifier(TINY, path)


@pytest.mark.parametrize("fields", [["geometry"], ["backbone", "small_images"]])
def test_a_description_of_a_checkpoint_of_ours_without_a_field_is_refused(tmp_path, fields):
    path = save_own_checkpoint(TransferClassifier(TINY, "none"), tmp_path / "run.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    for field in fields:
        del checkpoint["network"][field]
    torch.save(checkpoint, path)
    with pytest.raises(UserError, match=r"run\.ckpt is damaged or was altered: its network"):
        TransferClassifier(TINY, path, image_size="native")


def test_images_unlike_those_of_the_checkpoint_are_told(tmp_path, caplog):
    first = TransferClassifier(TINY, "none", image_size=64, normalize="imagenet")
    path = save_own_checkpoint(first, tmp_path / "run.ckpt")
    data = ShapesDataModule(train_images=100)
    quiet_trainer(fast_dev_run=True).fit(TransferClassifier(TINY, path), data)
    sizes = "come from images of 64 x 64 pixels, and the network now sees 32 x 32"
    assert f"{sizes}: set --model.image_size" in caplog.text
    assert "come from images of other statistics: see --model.normalize" in caplog.text
    caplog.clear()
    same = TransferClassifier(TINY, path, image_size=64, normalize="imagenet")
    quiet_trainer(fast_dev_run=True).fit(same, data)
    assert "come from images" not in caplog.text


def test_an_adaptation_to_other_images_is_told(tmp_path):
    write_images(tmp_path / "train", 4, size=(96, 96))
    data = ImageFolderDataModule(str(tmp_path), val_fraction=0.5, batch_size=4)
    model = TransferClassifier("alexnet", "none", num_classes=2, small_images=True)
    message = r"adapted to images of 32 pixels, and these have 96 x 96: set --model\.image_size"
    with pytest.warns(UserWarning, match=message):
        quiet_trainer(fast_dev_run=True).fit(model, data)


def test_weights_alone_are_no_run_to_continue(tmp_path):
    path = save_own_checkpoint(TransferClassifier(TINY, "none"), tmp_path / "run.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    torch.save(checkpoint | {"global_step": 1}, path)  # as `save_checkpoint(weights_only=True)`
    options = [
        f"--model.backbone={TINY}",
        "--data=ShapesDataModule",
        "--data.train_images=100",
        f"--ckpt_path={path}",
    ]
    message = r"holds weights alone, and no run to continue: begin with --model\.weights=FILE"
    with pytest.raises(UserError, match=message):
        fit(options)


def test_native_is_what_a_checkpoint_of_ours_was_trained_with(tmp_path):
    for side in (None, 48):
        first = TransferClassifier(TINY, "none", image_size=side)
        path = save_own_checkpoint(first, tmp_path / "a.ckpt")
        second = TransferClassifier(TINY, path, image_size="native")
        assert second.classifier.geometry.input_side == (side or 32)


@pytest.mark.slow
def test_a_transformer_of_ours_goes_from_one_size_to_another(tmp_path):
    torch.manual_seed(0)
    first = TransferClassifier("vit_b_32", "none", num_classes=3, image_size=64, patch_size=16)
    path = save_own_checkpoint(first, tmp_path / "run.ckpt")
    second = TransferClassifier("vit_b_32", path, num_classes=3, image_size=96, patch_size=16)
    assert second.network.encoder.pos_embedding.shape[1] == 6 * 6 + 1
    assert torch.equal(second.network.conv_proj.weight, first.network.conv_proj.weight)


@pytest.mark.slow
def test_torchvisions_old_names_of_densenet(tmp_path):
    """Its files of DenseNet have `norm.1` where the network has `norm1`, and no counters."""
    torch.manual_seed(0)
    state = models.densenet121().state_dict()
    published = {}
    for key, value in state.items():
        old_key = re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", key)
        if "num_batches" not in old_key:
            published[old_key] = value
    assert "features.denseblock1.denselayer1.norm.1.weight" in published
    torch.save(published, tmp_path / "w.pth")
    model = TransferClassifier("densenet121", str(tmp_path / "w.pth"), num_classes=3)
    assert_backbone_arrived(model, state)


@pytest.mark.slow
def test_torchvisions_old_names_and_larger_images_of_vit(tmp_path):
    """Its files of ViT have `mlp.linear_1` and no version; those of SWAG are for 384 pixels."""
    torch.manual_seed(0)
    state = models.vit_b_16(image_size=384).state_dict()
    published = {}
    for key, value in state.items():
        old_key = key.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2.")
        published[old_key] = value
    assert published.keys() != state.keys()
    path = str(tmp_path / "w.pth")
    torch.save(published, path)
    model = TransferClassifier("vit_b_16", path, num_classes=3, image_size=384)
    assert_backbone_arrived(model, state)
    model = TransferClassifier("vit_b_16", path, num_classes=3, image_size=32, small_images=True)
    assert model.network.encoder.pos_embedding.shape[1] == 8 * 8 + 1


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_mnasnet_which_insists_on_a_version(tmp_path, name):
    torch.manual_seed(0)
    network = models.mnasnet0_5()
    path = save_weights(network, tmp_path / name)
    assert_backbone_arrived(TransferClassifier("mnasnet0_5", path), network.state_dict())


def test_auxiliary_heads_of_published_files_are_ignored(tmp_path):
    network = models.googlenet(init_weights=False, aux_logits=True)
    path = save_weights(network, tmp_path / "w.pth")
    assert any(key.startswith("aux1.") for key in network.state_dict())
    model = TransferClassifier("googlenet", path, num_classes=3)
    assert_backbone_arrived(model, network.state_dict())
    assert not any(".aux1." in key for key in model.state_dict())


@pytest.mark.slow
def test_a_head_without_bias_is_dropped(tmp_path):
    network = models.maxvit_t(num_classes=7)
    path = save_weights(network, tmp_path / "w.pth")
    model = TransferClassifier("maxvit_t", path, num_classes=3, image_size="native")
    assert_backbone_arrived(model, network.state_dict())


OTHER_NETWORKS = ["resnet18"]
if find_spec("timm"):
    OTHER_NETWORKS += ["timm/test_vit", "timm/swin_tiny_patch4_window7_224"]


@pytest.mark.parametrize("name", OTHER_NETWORKS)
def test_weights_of_another_network_are_refused(tmp_path, upstream, name):
    path = save_weights(upstream, tmp_path / "w.pth")
    message = r"do not fit the network. Keys missing: .*; unknown: "
    with pytest.raises(UserError, match=message) as raised:
        TransferClassifier(name, path, num_classes=3)
    assert "\n" not in str(raised.value)


def moco_v3(network, head, width):
    """Return what facebookresearch/moco-v3 saves: two encoders, a predictor, the optimizer."""
    state = {}
    for key, value in network.state_dict().items():
        if not key.startswith(f"{head}."):
            state[f"module.base_encoder.{key}"] = value
            state[f"module.momentum_encoder.{key}"] = torch.zeros_like(value)
    for layer in (0, 3, 6):
        projector = torch.randn(width, width)
        state[f"module.base_encoder.{head}.{layer}.weight"] = projector
        state[f"module.momentum_encoder.{head}.{layer}.weight"] = torch.zeros_like(projector)
    state["module.predictor.0.weight"] = torch.randn(width, width)
    return {
        "epoch": 300,
        "arch": "x",
        "state_dict": state,
        "optimizer": torch.optim.SGD(network.parameters(), 0.1).state_dict(),
        "scaler": {"scale": 65536.0},
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "head"),
    [("resnet50", "fc"), pytest.param("timm/vit_base_patch16_224", "head", id="vit_base")],
)
def test_moco_v3(tmp_path, name, head):
    if name.startswith("timm/"):
        pytest.importorskip("timm", reason="timm is an optional extra")
    torch.manual_seed(0)
    network = build_stock(name)
    path = str(tmp_path / "r-50-300ep.pth.tar")
    torch.save(moco_v3(network, head, 16), path)
    model = TransferClassifier(name, path, num_classes=3, image_size=224)
    assert_backbone_arrived(model, network.state_dict())


def with_prefix(state, prefix):
    return {f"{prefix}{key}": value for key, value in state.items()}


def published_by(publisher, state):
    """Return a checkpoint of a ViT as a publisher wraps it."""
    if publisher == "timm":
        return state
    if publisher == "deit":
        return {"model": state, "args": Namespace(lr=0.1), "epoch": 3}
    if publisher == "dino":
        zeros = {key: torch.zeros_like(value) for key, value in state.items()}
        teacher = with_prefix(state, "backbone.")
        teacher["head.mlp.0.weight"] = torch.zeros(3, 3)
        return {"student": with_prefix(zeros, "module.backbone."), "teacher": teacher, "epoch": 3}
    if publisher == "lightning":
        return {"state_dict": with_prefix(state, "model."), "pytorch-lightning_version": "2.5"}
    return {"state_dict": with_prefix(state, "module.")}


@pytest.mark.parametrize("publisher", ["timm", "deit", "dino", "lightning", "ddp"])
def test_publishers_wrappings(tmp_path, publisher):
    pytest.importorskip("timm", reason="timm is an optional extra")
    torch.manual_seed(0)
    state = build_stock(VIT).state_dict()
    path = str(tmp_path / "w.pth")
    torch.save(published_by(publisher, state), path)
    model = TransferClassifier(VIT, path, num_classes=3, image_size=224)
    assert_backbone_arrived(model, state)


@pytest.mark.slow
def test_microsofts_own_files_of_swin(tmp_path):
    """They have tables of indices, and other names for mergings and head: timm converts them."""
    pytest.importorskip("timm", reason="timm is an optional extra")
    torch.manual_seed(0)
    name = "timm/swin_tiny_patch4_window7_224"
    state = build_stock(name).state_dict()
    published = {}
    for key, value in state.items():
        key = key.replace("head.fc.", "head.")
        match = re.match(r"layers\.(\d)\.downsample\.(.*)", key)
        if match:  # a stage ends with it there, and begins with it in timm
            key = f"layers.{int(match[1]) - 1}.downsample.{match[2]}"
        published[key] = value
    indices = torch.zeros(49, 49, dtype=torch.long)
    published["layers.0.blocks.0.attn.relative_position_index"] = indices
    path = str(tmp_path / "swin.pth")
    torch.save({"model": published}, path)
    model = TransferClassifier(name, path, num_classes=3, image_size=224)
    assert_backbone_arrived(model, state)


@pytest.mark.slow
def test_microsofts_own_files_of_beit(tmp_path):
    """They have tables of indices, and their tables of positions are resampled."""
    pytest.importorskip("timm", reason="timm is an optional extra")
    torch.manual_seed(0)
    name = "timm/beit_base_patch16_224"
    state = build_stock(name).state_dict()
    indices = torch.zeros(197, 197, dtype=torch.long)
    published = state | {"blocks.0.attn.relative_position_index": indices}
    path = str(tmp_path / "beit.pth")
    torch.save({"model": published}, path)
    model = TransferClassifier(name, path, num_classes=3, image_size=224)
    assert_backbone_arrived(model, state)
    small = TransferClassifier(name, path, num_classes=3, image_size=32, small_images=True)
    table = small.network.state_dict()["blocks.0.attn.relative_position_bias_table"]
    assert table.shape[0] == (2 * 8 - 1) ** 2 + 3, "8 x 8 patches"


WRAPPED = {
    "PyTorch's tutorial": lambda state: {"epoch": 3, "model_state_dict": state, "loss": 0.4},
    "net": lambda state: {"net": state, "acc": 91.2, "epoch": 3},
    "weights": lambda state: {"weights": state},
    "network": lambda state: {"network": state, "optimizer": {"state": {}, "param_groups": []}},
    "model_state": lambda state: {"model_state": state},
    "params": lambda state: {"params": state},
    "DeepSpeed": lambda state: {"module": state},
    "any other name": lambda state: {"backbone_weights": state, "epoch": 3},
    "student alone": lambda state: {"student": with_prefix(state, "module.backbone.")},
    "an average alone": lambda state: {"state_dict_ema": state, "epoch": 3},
    "one within another": lambda state: {"model": {"epoch": 3, "state_dict": state}},
    "torchvision's reference": lambda state: {
        "model": state,
        "model_ema": {"n_averaged": torch.tensor(7), **with_prefix(state, "module.")},
        "optimizer": {"state": {}, "param_groups": []},
        "args": Namespace(lr=0.1),
    },
    "torch's average alone": lambda state: {
        "n_averaged": torch.tensor(7),
        **with_prefix(state, "module."),
    },
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_a_state_dict_is_found_within_what_people_save_around_it(tmp_path, upstream, wrap):
    torch.save(wrap(upstream.state_dict()), tmp_path / "w.pth")
    model = TransferClassifier(TINY, str(tmp_path / "w.pth"), num_classes=4)
    assert_backbone_arrived(model, upstream.state_dict())


def test_of_several_state_dicts_none_is_guessed(tmp_path, upstream):
    state = upstream.state_dict()
    torch.save({"first": state, "second": state}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"holds several state dicts \(first, second\): save the"):
        TransferClassifier(TINY, str(tmp_path / "w.pth"))


def test_an_entry_that_holds_itself_is_no_state_dict(tmp_path):
    content = {"epoch": 3}
    content["model"] = content
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(UserError, match="is no state dict"):
        TransferClassifier(TINY, str(tmp_path / "w.pth"))


def test_mismatches_name_the_keys(tmp_path, upstream):
    state = upstream.state_dict()
    del state["conv1.0.weight"]
    state["conv9.weight"] = torch.zeros(1)
    state["conv5.0.weight"] = torch.zeros(3)
    torch.save(state, tmp_path / "w.pth")
    message = r"missing: conv1\.0\.weight.*unknown: conv9\.weight.*shape: conv5\.0\.weight"
    with pytest.raises(UserError, match=message):
        TransferClassifier(TINY, str(tmp_path / "w.pth"))


def test_values_that_are_no_numbers_are_refused(tmp_path, upstream):
    state = upstream.state_dict()
    state["conv5.0.weight"][0, 0] = float("nan")
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"NaN or infinite, in conv5\.0\.weight"):
        TransferClassifier(TINY, str(tmp_path / "w.pth"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps(Program("it-was-run"), protocol=2), "more than tensors"),
        (b"", "cannot be read|more than tensors"),
        (b"<html>404</html>", "more than tensors"),
    ],
    ids=["a program", "empty", "a page"],
)
def test_files_that_are_no_weights_are_refused_and_not_run(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "w.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        TransferClassifier(TINY, str(path))
    torch.save({"weight": Program("it-was-run")}, path)
    with pytest.raises(UserError, match="more than tensors"):
        TransferClassifier(TINY, str(path))
    assert not (tmp_path / "it-was-run").exists()


def test_a_file_cut_short_is_refused(tmp_path, upstream):
    path = tmp_path / "w.pth"
    save_weights(upstream, path)
    path.write_bytes(path.read_bytes()[:10_000])
    with pytest.raises(UserError, match=r"cut short|more than tensors"):
        TransferClassifier(TINY, str(path))


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("resnet18", "resnet18-tinyimagenet.pth"),
        ("mobilenet_v2", "mobilenet_v2-imagenet1k.pth"),
        ("resnet50", "resnet50-imagenet1k.pth"),
    ],
)
def test_real_weights_load(shared, name, file):
    path = shared / "weights" / file
    model = TransferClassifier(name, str(path))
    state = torch.load(path, weights_only=True)
    for key, value in model.network.state_dict().items():  # counters, which older files lack
        if key.endswith("num_batches_tracked"):
            state.setdefault(key, value)
    assert_backbone_arrived(model, state)


def test_catalogue_is_json_and_says_where_weights_are():
    entry = next(iter(catalog.weights("resnet18").values()))
    assert entry.url.endswith("resnet18-f37072fd.pth")
    assert (entry.native_side, entry.parameters, entry.top1_error) == (224, 11689512, 30.242)
    json.dumps(entry.__dict__)
