"""Stages, found by one rule: complete, in order, of the names that people know, and in agreement with timm's."""

import re
from itertools import pairwise

import pytest
import torch
from conftest import run_fit
from torch import nn
from torchvision import models

from cifar_transfer.network import build
from cifar_transfer.network.stages import stages

# The order in which forward passes through the network, by the stages' names.
KNOWN = {
    "resnet18": ["stem", "layer1", "layer2", "layer3", "layer4", "head"],
    "resnext50_32x4d": ["stem", "layer1", "layer2", "layer3", "layer4", "head"],
    "vgg11_bn": [
        "stem",
        *(f"features.{n}" for n in (4, 8, 11, 15, 18, 22, 25)),
        "classifier.0",
        "classifier.3",
        "head",
    ],
    "densenet121": [
        *(
            "stem",
            *(f"features.{kind}{n}" for n in (1, 2, 3) for kind in ("denseblock", "transition")),
        ),
        *("features.denseblock4", "head"),
    ],
    "timm/selecsls42": [
        "stem",
        *(f"features.{n}" for n in range(6)),
        "head.",
        "head",
    ],  # the first is no head
    "efficientnet_b0": ["stem", *(f"features.{n}" for n in range(1, 9)), "head"],
    "convnext_tiny": ["stem", *(f"features.{n}" for n in range(1, 8)), "head"],
    "vit_b_16": ["stem", *(f"encoder.layers.encoder_layer_{n}" for n in range(12)), "head"],
    "swin_t": ["stem", *(f"features.{n}" for n in range(1, 8)), "head"],
    "regnet_y_400mf": ["stem", *(f"trunk_output.block{n}" for n in range(1, 5)), "head"],
    "shufflenet_v2_x0_5": ["stem", "stage2", "stage3", "stage4", "conv5", "head"],
    "timm/resnet18": ["stem", "layer1", "layer2", "layer3", "layer4", "head"],
    "timm/efficientnet_b0": ["stem", *(f"blocks.{n}" for n in range(7)), "conv_head", "head"],
    "timm/vit_tiny_patch16_224": ["stem", *(f"blocks.{n}" for n in range(12)), "head"],
    "timm/convnext_atto": ["stem", *(f"stages.{n}" for n in range(4)), "head"],
    "lenet5": ["stem", "features.3", "features.6", "classifier.0", "head"],
}


def stock(name):
    return models.get_model(name) if "regnet" in name else build.stock(name, initialise=False)


@pytest.mark.parametrize("name", KNOWN)
def test_stages_have_the_names_and_the_order_of_the_network(name):
    network = stock(name)
    found = stages(network, build.head_names(network))
    assert list(found) == KNOWN[name]


def everything(network, heads):
    found = stages(network, heads)
    named = [
        network.named_parameters(remove_duplicate=False),
        network.named_buffers(remove_duplicate=False),
    ]
    state = [name for group in named for name, _ in group]
    names = [name for part in found.values() for name in part]
    assert sorted(names) == sorted(state), "each once"
    assert len(found) >= 4
    assert [*found][:1] + [*found][-1:] == ["stem", "head"]
    assert {name.rpartition(".")[0] for name in found["head"]} <= set(heads)


@pytest.mark.whole
@pytest.mark.parametrize(
    "name", [n for n in models.list_models(module=models) if "quantized" not in n]
)
def test_every_network_of_torchvision_has_stages(name):
    with torch.device("cpu" if "regnet" in name else "meta"):
        network = build.stock(name, initialise=False)
    everything(network, build.head_names(network))


FAMILIES = [
    "beit_base_patch16_224",
    "cait_xxs24_224",
    "coatnet_0_rw_224",
    "crossvit_tiny_240",
    "cspresnet50",
    "davit_tiny",
]
FAMILIES += [
    "deit3_small_patch16_224",
    "dla34",
    "dm_nfnet_f0",
    "edgenext_small",
    "efficientvit_b0",
    "eva02_tiny_patch14_224",
]
FAMILIES += [
    "fastvit_t8",
    "focalnet_tiny_srf",
    "ghostnet_100",
    "hgnetv2_b0",
    "inception_next_tiny",
    "levit_128",
    "maxvit_tiny_rw_224",
]
FAMILIES += [
    "mixer_b16_224",
    "mobilenetv3_small_100",
    "mobilenetv4_conv_small",
    "mobilevit_s",
    "mvitv2_tiny",
    "nest_tiny",
]
FAMILIES += ["pvt_v2_b0", "regnety_002", "repvgg_a0", "res2net50_26w_4s", "rexnet_100"]
FAMILIES += [
    "swin_tiny_patch4_window7_224",
    "tiny_vit_5m_224",
    "tresnet_m",
    "volo_d1_224",
    "xcit_nano_12_p16_224",
]


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n in FAMILIES[::8] else pytest.mark.whole) for n in FAMILIES],
)
def test_stages_are_in_the_order_of_timms_own_groups(name):
    """Of two parameters, the one in timm's later group is in no earlier stage (its groups are finer or coarser)."""
    timm = pytest.importorskip("timm", reason="timm is not installed")
    network = timm.create_model(name, num_classes=1000)
    heads = build.head_names(network)
    everything(network, heads)
    from timm.models import group_parameters

    groups = group_parameters(network, network.group_matcher(coarse=True))
    found = stages(network, heads)
    backbone = [stage for stage in found if stage != "head"]
    spans = {}
    for group, names in groups.items():
        inside = [backbone.index(stage) for stage in backbone if set(names) & set(found[stage])]
        if inside:
            spans[group] = (min(inside), max(inside))
    order = [spans[group] for group in sorted(spans)]
    assert all(a[0] <= b[0] for a, b in pairwise(order)), order


def test_other_peoples_modules_have_stages_too():
    block = lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.ReLU())  # noqa: E731
    network = nn.ModuleDict(
        {"encoder": nn.Sequential(*(block() for _ in range(5))), "norm": nn.LayerNorm(4)}
    )
    network["top"] = nn.Sequential(nn.Dropout(), nn.Linear(4, 2))
    found = stages(network, ["top.1"])
    assert list(found) == ["stem", *(f"encoder.{n}" for n in range(1, 5)), "head"]
    assert found["encoder.4"][-1] == "norm.bias", "goes with the stage before it"
    assert list(stages(nn.Linear(2, 2))) == ["stem"]
    assert stages(nn.Sequential()) == {}


def test_the_command_lists_them(tmp_path):
    done = run_fit(tmp_path, "--detail", "resnet18", command="backbones")
    assert re.search(r"^  stages  stem, layer1, layer2, layer3, layer4, head$", done.stdout, re.M)
