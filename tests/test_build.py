"""Every backbone of the table is built, gets a head, is frozen, trained, saved and loaded again."""

import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import quiet_trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision import models
from torchvision.models.regnet import BlockParams

from cifar_transfer import BackboneFreeze, TransferClassifier
from cifar_transfer.base.errors import UserError
from cifar_transfer.network import catalog
from cifar_transfer.network.build import build_backbone, build_stock, find_heads
from cifar_transfer.training.phases import matching_names

SMALL = {"small_images": True}
# Every network at its smallest sensible size, VGG and ViT adapted as one would adapt them there.
TABLE: dict[str, dict] = {
    "lenet5": {},
    "alexnet": SMALL,
    "vgg16": SMALL,
    "vgg19": SMALL,
    "googlenet": {},
    "inception_v3": {"image_size": 75},
    "resnet18": {},
    "resnet34": {},
    "resnet50": {},
    "resnet101": {},
    "resnet152": {},
    "densenet121": SMALL,
    "densenet169": {},
    "timm/mobilenetv1_100": SMALL,
    "mobilenet_v2": SMALL,
    "mobilenet_v3_small": SMALL,
    "mobilenet_v3_large": {},
    "efficientnet_b0": {},
    "efficientnet_b1": {},
    "efficientnet_b2": {},
    "efficientnet_b3": {},
    "efficientnet_b4": {},
    "efficientnet_b5": {},
    "efficientnet_b6": {},
    "efficientnet_b7": {},
    "timm/inception_resnet_v2": {"image_size": 75},
    "vit_b_16": {"image_size": 32},
    "timm/vit_base_patch16_224.augreg_in21k": {"image_size": 32, "patch_size": 8},
    "swin_t": SMALL,
    "swin_s": {},
    "swin_b": {},
    "swin_v2_t": SMALL,
    "timm/swin_tiny_patch4_window7_224": SMALL,
    "timm/swinv2_tiny_window8_256": SMALL,
    "timm/deit_tiny_patch16_224": {},
    "timm/deit_tiny_distilled_patch16_224": SMALL,
    "timm/beit_base_patch16_224": {"image_size": 32},
}
# The larger networks of a family that has smaller ones, and BEiT, which other tests build too.
LARGER = {
    "vgg16",
    "vit_b_16",
    "timm/vit_base_patch16_224.augreg_in21k",
    "timm/inception_resnet_v2",
    "vgg19",
    "resnet101",
    "resnet152",
    "swin_s",
    "swin_b",
    "efficientnet_b3",
    "efficientnet_b4",
    "efficientnet_b5",
    "efficientnet_b6",
    "efficientnet_b7",
    "timm/beit_base_patch16_224",
}


def batches(count=4, classes=3):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, 3, 32, 32, generator=generator)
    return DataLoader(TensorDataset(images, torch.arange(count) % classes), batch_size=count)


def skip_without_timm(name):
    if name.startswith("timm/"):
        pytest.importorskip("timm", reason="timm is an optional extra")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.whole] * (name in LARGER)) for name in TABLE]
)
def test_every_network_of_the_table(name, tmp_path, monkeypatch):
    skip_without_timm(name)
    # The initial values of layers do not matter here, and truncated normals are slow to draw.
    monkeypatch.setattr(
        nn.init, "trunc_normal_", lambda tensor, *_, **__: nn.init.normal_(tensor, std=0.02)
    )
    torch.manual_seed(0)
    model = TransferClassifier(name, "none", num_classes=3, lr=0.01, **TABLE[name])
    before = {key: value.clone() for key, value in model.named_parameters()}
    trainer = quiet_trainer(
        max_epochs=1, callbacks=[BackboneFreeze(unfreeze_epoch=1)], num_sanity_val_steps=0
    )
    trainer.fit(model, batches(), batches())
    head_prefixes = tuple(f"classifier.network.{head}." for head in model.heads)
    for key, value in model.named_parameters():
        is_trained = not torch.equal(value, before[key])
        assert is_trained == key.startswith(head_prefixes), key

    trainer.save_checkpoint(tmp_path / "run.ckpt")
    loaded = TransferClassifier.load_from_checkpoint(tmp_path / "run.ckpt").eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        logits = model.eval()(images)
        assert logits.shape == (2, 3)
        assert logits.isfinite().all()
        torch.testing.assert_close(loaded(images), logits, rtol=1e-5, atol=1e-5)
    state = model.state_dict()
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, state[key]), key


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "shufflenet_v2_x0_5", "vit_b_32"])
def test_weights_of_an_unadapted_network_fit_the_librarys(name):
    network = build_backbone(name, "none", 3, image_size=224).network
    models.get_model(name, num_classes=3).load_state_dict(network.state_dict())


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_googlenet_and_inception_have_no_auxiliary_heads(name):
    backbone = build_backbone(name, "none", 3, image_size=75)
    assert backbone.heads == ("fc",)
    assert not [key for key in backbone.network.state_dict() if "aux" in key.lower()]
    logits = backbone.network.train()(torch.rand(2, 3, 75, 75))
    assert logits.shape == (2, 3)
    library = models.get_model(name, num_classes=3, aux_logits=False, init_weights=False)
    library.load_state_dict(backbone.network.state_dict())


@pytest.mark.parametrize("name", catalog.TORCHVISION_NAMES)
def test_every_torchvision_network_has_a_head(name, monkeypatch):
    from_init_params = BlockParams.from_init_params.__func__

    def on_cpu(cls, *args, **options):  # RegNet computes its widths with tensors
        with torch.device("cpu"):
            return from_init_params(cls, *args, **options)

    monkeypatch.setattr(BlockParams, "from_init_params", classmethod(on_cpu))
    with torch.device("meta"):
        network = build_stock(name, initialise=False)
    layers = [key for key, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert find_heads(network) == (layers[-1],)
    assert catalog.default_weights(name).native_side >= 224


def test_both_heads_of_the_distilled_deit_answer_and_train():
    pytest.importorskip("timm", reason="timm is an optional extra")
    model = TransferClassifier("timm/deit_tiny_distilled_patch16_224", "none", num_classes=3)
    assert model.heads == ("head", "head_dist")
    model(torch.rand(2, 3, 32, 32)).sum().backward()
    for head in model.heads:
        assert model.network.get_submodule(head).weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["vgg16", "vgg19"])
def test_the_pattern_of_the_documents_freezes_the_first_ten_convolutions(name):
    pattern = r"network\.features\.(1?\d|2[01])\."
    with torch.device("meta"):
        network = build_stock(name)
    convolutions = []
    for index, layer in enumerate(network.features):
        if isinstance(layer, nn.Conv2d):
            convolutions.append(f"network.features.{index}.weight")
    model = nn.Module()
    model.network = network
    frozen = matching_names(model, [pattern])
    assert {name for name in frozen if name.endswith("weight")} == set(convolutions[:10])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "resnet81"}, "did you mean resnet18"),
        ({"backbone": "timm/vit_base_patch16_225"}, "did you mean timm/vit_base_patch16"),
        ({"backbone": "timm/vit_base_patch16_224.augreg_in22k"}, "augreg_in21k"),
        ({"backbone": "timm/gemma4_vit_167m_enc"}, "no head|There is no backbone"),
        (
            {"backbone": "lenet5", "weights": "DEFAULT"},
            "No weights of lenet5 are published.*weights=none",
        ),
        ({"backbone": "lenet5", "image_size": "native"}, "no native size"),
        ({"backbone": "lenet5", "normalize": "weights"}, "no published weights"),
        ({"backbone": "inception_v3", "image_size": 74}, r"75 or more, or native \(299\)"),
        (
            {"backbone": "alexnet", "image_size": 32},
            r"63 or more, or native \(224\), or try small_images",
        ),
        ({"backbone": "resnet18", "patch_size": 4}, "has no patches"),
        ({"backbone": "vit_b_16", "image_size": 40}, "do not divide images of 40"),
        (
            {"backbone": "timm/mixer_b16_224", "image_size": 32},
            "its own size only: set image_size=native",
        ),
    ],
)
def test_mistakes_are_refused_in_one_sentence(options, message):
    skip_without_timm(options["backbone"])
    with pytest.raises(UserError, match=message) as error:
        TransferClassifier(**{"weights": "none"} | options)
    assert "\n" not in str(error.value)


def test_without_timm_its_networks_are_refused_and_the_message_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"pip install '\.\[timm\]'"):
        TransferClassifier("timm/vit_base_patch16_224")


@pytest.mark.parametrize(
    ("number", "side"), list(enumerate((224, 240, 288, 300, 380, 456, 528, 600)))
)
def test_the_native_size_of_each_efficientnet(number, side):
    assert catalog.default_weights(f"efficientnet_b{number}").native_side == side


def test_native_size_and_statistics_come_from_the_weights():
    model = TransferClassifier("efficientnet_b1", "none", image_size="native", normalize="weights")
    assert model.classifier.geometry.input_side == 240
    assert model.classifier.geometry.mean == (0.485, 0.456, 0.406)
    assert model.classifier.geometry.std == (0.229, 0.224, 0.225)
    pytest.importorskip("timm", reason="timm is an optional extra")
    model = TransferClassifier("timm/mobilenetv1_100", "none", normalize="weights")
    assert model.classifier.geometry.mean == (0.5, 0.5, 0.5)
    assert model.classifier.geometry.std == (0.5, 0.5, 0.5)


def test_images_that_do_not_fit_are_refused_before_training():
    model = TransferClassifier("inception_v3", "none", num_classes=3)
    data = SimpleNamespace(num_classes=3, image_size=(32, 32))
    model._trainer = SimpleNamespace(datamodule=data, ckpt_path=None, callbacks=[])
    message = r"cannot take images of 32 x 32 pixels .*image_size=75 or more"
    with pytest.raises(UserError, match=message):
        model.setup("fit")


@pytest.mark.parametrize(
    "name", ["timm/coatnet_pico_rw_224", "timm/efficientvit_m0", "timm/maxvit_rmlp_pico_rw_256"]
)
@pytest.mark.parametrize("options", [{"image_size": 64}, {"image_size": 64, "small_images": True}])
def test_networks_with_windows_but_no_patches_are_brought_to_the_size_by_timm(name, options):
    pytest.importorskip("timm", reason="timm is an optional extra")
    model = TransferClassifier(name, "none", num_classes=3, **options).eval()
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 3)


def test_resuming_at_another_size_is_refused(tmp_path):
    pytest.importorskip("timm", reason="timm is an optional extra")
    first = quiet_trainer(max_epochs=1)
    first.fit(
        TransferClassifier("timm/test_vit", "none", num_classes=3, image_size=32),
        batches(),
        batches(),
    )
    first.save_checkpoint(tmp_path / "last.ckpt")
    other = TransferClassifier("timm/test_vit", "none", num_classes=3, image_size=64)
    with pytest.raises(
        UserError, match=r"model\.image_size=64 differs from 32, with which the run"
    ):
        quiet_trainer(max_epochs=2).fit(
            other, batches(), batches(), ckpt_path=tmp_path / "last.ckpt", weights_only=True
        )


def test_a_swin_whose_windows_timm_scales_itself():
    pytest.importorskip("timm", reason="timm is an optional extra")
    network = build_backbone("timm/swinv2_cr_tiny_224", "none", 3, image_size=64).network
    assert network.eval()(torch.rand(2, 3, 64, 64)).shape == (2, 3)
