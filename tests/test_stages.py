"""Stages are complete, in order, have the names that people know, and agree with timm's groups."""

import re
from itertools import pairwise

import pytest
import torch
from conftest import run_fit
from torch import nn
from torchvision import models

from cifar_transfer.network.build import build_stock, find_heads
from cifar_transfer.network.stages import find_stages

# Names of the stages in the order in which forward passes through the network.
STAGES = {
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
        "stem",
        "features.denseblock1",
        "features.transition1",
        "features.denseblock2",
        "features.transition2",
        "features.denseblock3",
        "features.transition3",
        "features.denseblock4",
        "head",
    ],
    # Its module "head" is a part of the backbone, not the head.
    "timm/selecsls42": ["stem", *(f"features.{n}" for n in range(6)), "head.", "head"],
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


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_stages_have_the_names_and_the_order_of_the_network(name):
    if name.startswith("timm/"):
        pytest.importorskip("timm", reason="timm is an optional extra")
    network = build_stock(name, initialise=False)
    assert list(find_stages(network, find_heads(network))) == STAGES[name]


def assert_complete(network, heads):
    """Assert that every parameter and buffer is in one stage, and only the heads are in "head"."""
    stages = find_stages(network, heads)
    assert len(stages) >= 4
    assert next(iter(stages)) == "stem"
    assert list(stages)[-1] == "head"
    expected = []
    for name, _ in network.named_parameters(remove_duplicate=False):
        expected.append(name)
    for name, _ in network.named_buffers(remove_duplicate=False):
        expected.append(name)
    actual = []
    for tensors in stages.values():
        actual.extend(tensors)
    assert sorted(actual) == sorted(expected)
    for name in stages["head"]:
        assert name.rpartition(".")[0] in heads


TORCHVISION_NAMES = [n for n in models.list_models(module=models) if "quantized" not in n]


@pytest.mark.whole
@pytest.mark.parametrize("name", TORCHVISION_NAMES)
def test_every_network_of_torchvision_has_stages(name):
    with torch.device("cpu" if "regnet" in name else "meta"):
        network = build_stock(name, initialise=False)
    assert_complete(network, find_heads(network))


# One network of each of many families of timm. Each change is tested with a sample of them.
SAMPLE = [
    "beit_base_patch16_224",
    "dm_nfnet_f0",
    "inception_next_tiny",
    "nest_tiny",
    "tresnet_m",
]
OTHER_FAMILIES = [
    "cait_xxs24_224",
    "coatnet_0_rw_224",
    "crossvit_tiny_240",
    "cspresnet50",
    "davit_tiny",
    "deit3_small_patch16_224",
    "dla34",
    "edgenext_small",
    "efficientvit_b0",
    "eva02_tiny_patch14_224",
    "fastvit_t8",
    "focalnet_tiny_srf",
    "ghostnet_100",
    "hgnetv2_b0",
    "levit_128",
    "maxvit_tiny_rw_224",
    "mixer_b16_224",
    "mobilenetv3_small_100",
    "mobilenetv4_conv_small",
    "mobilevit_s",
    "mvitv2_tiny",
    "pvt_v2_b0",
    "regnety_002",
    "repvgg_a0",
    "res2net50_26w_4s",
    "rexnet_100",
    "swin_tiny_patch4_window7_224",
    "tiny_vit_5m_224",
    "volo_d1_224",
    "xcit_nano_12_p16_224",
]


@pytest.mark.parametrize(
    "name",
    [*SAMPLE, *(pytest.param(name, marks=pytest.mark.whole) for name in OTHER_FAMILIES)],
)
def test_stages_are_in_the_order_of_timms_own_groups(name):
    """timm's groups may be finer or coarser, but a later group never begins in an earlier stage."""
    timm = pytest.importorskip("timm", reason="timm is not installed")
    from timm.models import group_parameters

    network = timm.create_model(name, num_classes=1000)
    heads = find_heads(network)
    assert_complete(network, heads)
    stages = find_stages(network, heads)
    del stages["head"]
    groups = group_parameters(network, network.group_matcher(coarse=True))
    spans = []
    for group in sorted(groups):
        positions = stages_of(groups[group], stages)
        if positions:
            spans.append((min(positions), max(positions)))
    for earlier, later in pairwise(spans):
        assert earlier[0] <= later[0], spans


def stages_of(names, stages):
    """Return the positions of the stages that have some of the tensors."""
    positions = []
    for position, tensors in enumerate(stages.values()):
        if set(names) & set(tensors):
            positions.append(position)
    return positions


def test_other_peoples_modules_have_stages_too():
    blocks = nn.Sequential()
    for _ in range(5):
        blocks.append(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.ReLU()))
    network = nn.ModuleDict(
        {
            "encoder": blocks,
            "norm": nn.LayerNorm(4),
            "top": nn.Sequential(nn.Dropout(), nn.Linear(4, 2)),
        }
    )
    stages = find_stages(network, ["top.1"])
    assert list(stages) == ["stem", "encoder.1", "encoder.2", "encoder.3", "encoder.4", "head"]
    assert stages["encoder.4"][-1] == "norm.bias", "a norm belongs to the stage before it"
    assert stages["head"] == ["top.1.weight", "top.1.bias"]


def test_a_network_of_one_layer_is_all_stem():
    assert list(find_stages(nn.Linear(2, 2))) == ["stem"]
    assert find_stages(nn.Sequential()) == {}


def test_the_command_lists_stages(tmp_path):
    done = run_fit(tmp_path, "--detail", "resnet18", command="backbones")
    assert re.search(r"^  stages  stem, layer1, layer2, layer3, layer4, head$", done.stdout, re.M)
