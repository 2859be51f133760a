"""Every backbone of the table: built, its head found, frozen, trained for a step, saved, reloaded, exported."""

import pytest
import torch
from conftest import quiet_trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision import models
from torchvision.models.regnet import BlockParams

from cifar_transfer import BackboneFreeze, TransferClassifier
from cifar_transfer.base.errors import UserError
from cifar_transfer.network import build, catalog
from cifar_transfer.training.phases import matching_names

SMALL = {"small_images": True}
# Each at its smallest sensible size; VGG and ViT with smaller patches or classifier, as one would use them there.
TABLE: dict[str, dict] = {
    "lenet5": {},
    "alexnet": SMALL,
    "vgg16": SMALL,
    "vgg19": SMALL,
    "googlenet": {"aux_weight": 0.3},
    "inception_v3": {"image_size": 75},
    **{f"resnet{depth}": {} for depth in (18, 34, 50, 101, 152)},
    "densenet121": SMALL,
    "densenet169": {},
    "timm/mobilenetv1_100": SMALL,
    "mobilenet_v2": SMALL,
    "mobilenet_v3_small": SMALL,
    "mobilenet_v3_large": {},
    **{f"efficientnet_b{number}": {} for number in range(8)},
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

# The larger ones of a family that has smaller ones, and BEiT, of which other tests make two.
LARGER = {
    "vgg19",
    "resnet101",
    "resnet152",
    "swin_s",
    "swin_b",
    *(f"efficientnet_b{number}" for number in range(3, 8)),
}
LARGER |= {"timm/beit_base_patch16_224"}


def batches(count=4, classes=3):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, 3, 32, 32, generator=generator)
    return DataLoader(TensorDataset(images, torch.arange(count) % classes), batch_size=count)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.whole] * (name in LARGER)) for name in TABLE]
)
def test_every_network_of_the_table(name, tmp_path, monkeypatch):
    if name.startswith("timm/"):
        pytest.importorskip("timm", reason="timm is an optional extra")
    # A stand-in for slow draws: what a layer begins with is of no account here.
    monkeypatch.setattr(
        nn.init, "trunc_normal_", lambda tensor, *_, **__: nn.init.normal_(tensor, std=0.02)
    )
    torch.manual_seed(0)
    model = TransferClassifier(name, "none", num_classes=3, lr=0.01, **TABLE[name])
    before = {key: value.clone() for key, value in model.named_parameters()}
    freeze = BackboneFreeze(unfreeze_epoch=1)
    trainer = quiet_trainer(
        max_epochs=1,
        callbacks=[freeze],
        num_sanity_val_steps=0,
    )
    trainer.fit(model, batches(), batches())
    heads = tuple(f"classifier.network.{head}." for head in model.heads)
    trained = {
        key for key, value in model.named_parameters() if not torch.equal(value, before[key])
    }
    assert trained == {key for key in before if key.startswith(heads)}, (
        "the heads train, and nothing else"
    )

    trainer.save_checkpoint(tmp_path / "run.ckpt")
    again = TransferClassifier.load_from_checkpoint(tmp_path / "run.ckpt").eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        logits = model.eval()(images)
        assert logits.shape == (2, 3)
        assert logits.isfinite().all()
        torch.testing.assert_close(again(images), logits, rtol=1e-5, atol=1e-5)
    state = model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in again.state_dict().items())

    if not TABLE[name] and name in catalog.TORCHVISION:  # adapted, it fits no stock network
        models.get_model(name, num_classes=3).load_state_dict(model.network.state_dict())


@pytest.mark.parametrize("name", catalog.TORCHVISION)
def test_every_torchvision_network_has_a_head(name, monkeypatch):
    original = BlockParams.from_init_params.__func__

    def on_cpu(cls, *args, **options):  # RegNet computes its widths with tensors
        with torch.device("cpu"):
            return original(cls, *args, **options)

    monkeypatch.setattr(BlockParams, "from_init_params", classmethod(on_cpu))
    with torch.device("meta"):
        network = build.stock(name, initialise=False)
    (head,) = build.head_names(network)
    last = [key for key, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1]
    assert head == last
    assert next(iter(catalog.weights(name).values())).native >= 224


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("googlenet", {"aux1.fc2", "aux2.fc2", "fc"}),
        ("inception_v3", {"AuxLogits.fc", "fc"}),
    ],
)
def test_auxiliary_heads_count_in_the_loss(name, heads):
    size = 96 if name == "googlenet" else 299
    torch.manual_seed(0)
    model = TransferClassifier(name, "none", num_classes=3, aux_weight=0.5, image_size=size).train()
    assert set(model.heads) == heads
    images, labels = torch.rand(2, 3, 32, 32), torch.tensor([0, 2])
    torch.manual_seed(1)
    loss = model.training_step((images, labels), 0)
    torch.manual_seed(1)
    outputs = model.all_logits(images, size)
    main, *auxiliary = (nn.functional.cross_entropy(logits, labels) for logits in outputs)
    torch.testing.assert_close(loss, main + 0.5 * sum(auxiliary), rtol=1e-4, atol=1e-4)
    assert len(outputs) == len(heads)
    assert isinstance(model.eval()(images), torch.Tensor)
    dropped = TransferClassifier(name, "none", num_classes=3, image_size=size)
    assert dropped.heads == ("fc",)
    assert not [key for key in dropped.network.state_dict() if "aux" in key.lower()]


def test_both_heads_of_the_distilled_deit_answer_and_train():
    pytest.importorskip("timm", reason="timm is an optional extra")
    model = TransferClassifier("timm/deit_tiny_distilled_patch16_224", "none", num_classes=3)
    assert model.heads == ("head", "head_dist")
    model(torch.rand(2, 3, 32, 32)).sum().backward()
    assert all(
        model.network.get_submodule(head).weight.grad.abs().sum() > 0 for head in model.heads
    )


@pytest.mark.parametrize(("name", "last"), [("vgg16", 22), ("vgg19", 22)])
def test_the_first_ten_convolutions_freeze_by_a_pattern(name, last):
    """The README's pattern."""
    pattern = r"network\.features\.(1?\d|2[01])\."
    with torch.device("meta"):
        network = build.stock(name)
    convolutions = [
        f"network.features.{i}.weight"
        for i, m in enumerate(network.features)
        if isinstance(m, nn.Conv2d)
    ]
    model = nn.Module()
    model.network = network
    frozen = matching_names(model, [pattern])
    assert [name for name in convolutions if name in frozen] == convolutions[:10]
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
        ({"backbone": "resnet18", "aux_weight": 0.3}, "no auxiliary heads"),
        ({"backbone": "resnet18", "patch_size": 4}, "has no patches"),
        ({"backbone": "vit_b_16", "image_size": 40}, "do not divide images of 40"),
        (
            {"backbone": "timm/mixer_b16_224", "image_size": 32},
            "its own size only: set image_size=native",
        ),
    ],
)
def test_mistakes_get_a_sentence(options, message):
    if options["backbone"].startswith("timm/"):
        pytest.importorskip("timm", reason="timm is an optional extra")
    with pytest.raises(UserError, match=message) as error:
        TransferClassifier(**{"weights": "none"} | options)
    assert "\n" not in str(error.value)


def test_without_timm_its_networks_are_refused_with_the_way_to_get_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(UserError, match=r"pip install '\.\[timm\]'"):
        TransferClassifier("timm/vit_base_patch16_224")


@pytest.mark.parametrize(
    ("number", "size"), list(enumerate((224, 240, 288, 300, 380, 456, 528, 600)))
)
def test_native_is_each_efficientnets_own_size(number, size):
    assert next(iter(catalog.weights(f"efficientnet_b{number}").values())).native == size


def test_native_size_and_statistics_are_the_weights_and_are_kept(tmp_path):
    model = TransferClassifier("efficientnet_b1", "none", image_size="native", normalize="weights")
    assert model.hparams["image_size"] == 240
    assert model.hparams["normalize"] == [[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]
    pytest.importorskip("timm", reason="timm is an optional extra")
    model = TransferClassifier("timm/mobilenetv1_100", "none", normalize="weights")
    assert model.hparams["normalize"] == [[0.5] * 3, [0.5] * 3]


def test_images_that_do_not_fit_are_known_before_training():
    model = TransferClassifier("inception_v3", "none", num_classes=3)

    class Data:
        num_classes, image_size = 3, (32, 32)

    model._trainer = type("Trainer", (), {"datamodule": Data(), "ckpt_path": None})()
    with pytest.raises(
        UserError, match=r"cannot take images of 32 x 32 pixels .*image_size=75 or more"
    ):
        model.setup("fit")
    model = TransferClassifier("inception_v3", "none", num_classes=3, image_size=75, aux_weight=0.4)
    model._trainer = type("Trainer", (), {"datamodule": Data(), "ckpt_path": None})()
    with pytest.raises(
        UserError, match="cannot take images of 75 pixels"
    ):  # its auxiliary head cannot
        model.setup("fit")


@pytest.mark.parametrize(
    "name", ["timm/coatnet_pico_rw_224", "timm/efficientvit_m0", "timm/maxvit_rmlp_pico_rw_256"]
)
@pytest.mark.parametrize("options", [{"image_size": 64}, {"image_size": 64, "small_images": True}])
def test_windows_without_patches_are_fitted_by_timm(name, options):
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
        UserError, match="image_size=64 timm/test_vit has another form than in the checkpoint"
    ):
        quiet_trainer(max_epochs=2).fit(
            other, batches(), batches(), ckpt_path=tmp_path / "last.ckpt", weights_only=True
        )


def test_swin_whose_windows_timm_scales_itself():
    pytest.importorskip("timm", reason="timm is an optional extra")
    network = build.build("timm/swinv2_cr_tiny_224", "none", 3, image_size=64).network
    assert network.eval()(torch.rand(2, 3, 64, 64)).shape == (2, 3)
