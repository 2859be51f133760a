"""Backbones as commands name them, and what `backbones` says of them."""

import json

import pytest

from cifar_transfer.base.errors import UserError
from cifar_transfer.commands import backbones
from cifar_transfer.network import catalog
from cifar_transfer.network.contestant import parse_contestant, parse_contestants
from cifar_transfer.network.summary import inspect_backbone, summarise


@pytest.fixture
def run_backbones(capsys):
    def run(*options):
        backbones.main(options)
        return capsys.readouterr().out

    return run


def test_the_table(run_backbones):
    heading, _, row, *rest = run_backbones("resnet?8").splitlines()
    assert cells(heading) == backbones.HEADINGS
    assert cells(row)[:6] == ["resnet18", "11.69", "30.24", "10.92", "224", "IMAGENET1K_V1"]
    assert rest == ["", "timm's networks: python -m cifar_transfer backbones 'timm/*' (needs timm)"]


def cells(line):
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_the_list_in_json(run_backbones):
    rows = {row["name"]: row for row in json.loads(run_backbones("--json"))}
    assert set(rows) == {"lenet5", *catalog.TORCHVISION_NAMES}
    assert rows["lenet5"]["native"] == 32
    assert rows["resnet18"] == {
        "name": "resnet18",
        "parameters": 11689512,
        "top1_error": 30.242,
        "top5_error": 10.922,
        "native": 224,
        "weights": ["IMAGENET1K_V1"],
        "licence_or_source": rows["resnet18"]["licence_or_source"],
    }


def test_a_pattern_that_matches_nothing_is_refused(run_backbones):
    with pytest.raises(UserError, match="No backbone is named like 'resnet81'"):
        run_backbones("resnet81")


def test_what_timm_does_not_say_is_left_blank(run_backbones):
    pytest.importorskip("timm", reason="timm is an optional extra")
    summary = summarise("timm/mobilenetv1_100")
    assert summary.parameters is None
    assert summary.native == 224
    assert summary.licence_or_source == "apache-2.0"
    assert summary.weights[0] == "ra4_e3600_r224_in1k"
    row = run_backbones("timm/mobilenetv1_100").splitlines()[2]
    assert cells(row)[:5] == ["timm/mobilenetv1_100", "", "", "", "224"]
    assert "augreg_in21k" in summarise("timm/vit_base_patch16_224").weights


def test_details(run_backbones):
    text = run_backbones("--detail", "resnet18")
    assert "head    fc: Linear(in_features=512, out_features=10" in text
    assert "frozen  11,176,512 of 11,181,642 parameters" in text
    assert "conv1: 3x3 stride 1 from 7x7 stride 2" in text
    assert "small_images=true, at 32 pixels" in text


def test_details_of_a_network_that_does_not_take_32_pixels():
    details = inspect_backbone("alexnet", None)
    assert details.side == 63
    assert details.small_side == 32


def test_details_of_an_unknown_network_or_size_are_refused(run_backbones):
    with pytest.raises(UserError, match="There is no backbone 'resnet81'"):
        run_backbones("--detail", "resnet81")
    message = r"^inception_v3 cannot take images of 40 pixels: set image_size=75 or more"
    with pytest.raises(UserError, match=message):
        inspect_backbone("inception_v3", 40)


def test_a_contestant_without_weights_has_the_default_ones():
    contestant = parse_contestant("resnet18")
    assert contestant.label == "resnet18, pretrained"
    assert contestant.options == ["--model.backbone=resnet18"]


def test_a_contestant_with_a_file_is_named_after_it(tmp_path):
    file = tmp_path / "mine.pth"
    file.touch()
    contestant = parse_contestant(f"resnet18={file}")
    assert contestant.label == "resnet18, mine"
    assert contestant.folder == "resnet18-mine"
    assert contestant.options == ["--model.backbone=resnet18", f"--model.weights={file}"]
    (tmp_path / "resnet18-tiny.pth").touch()
    contestant = parse_contestant(f"resnet18={tmp_path / 'resnet18-tiny.pth'}")
    assert contestant.label == "resnet18, tiny"


def test_a_contestant_from_scratch_is_never_frozen():
    contestant = parse_contestant("resnet18=none")
    assert contestant.scratch
    assert contestant.label == "resnet18, from scratch"
    assert contestant.options == [
        "--model.backbone=resnet18",
        "--model.weights=none",
        "--freeze.unfreeze_epoch=0",
        "--freeze.phases=null",
        "--freeze.probe=false",
    ]


def test_a_contestant_of_timm_has_a_folder_without_a_slash():
    pytest.importorskip("timm", reason="timm is an optional extra")
    contestant = parse_contestant("timm/vit_tiny_patch16_224")
    assert contestant.folder == "timm-vit_tiny_patch16_224-pretrained"


def test_two_contestants_of_one_name_are_refused():
    with pytest.raises(UserError, match="Two of the backbones have one name"):
        parse_contestants(["resnet18=none", "lenet5=none", "resnet18=none"])
    with pytest.raises(UserError, match="is neither a file nor a name of resnet18's weights"):
        parse_contestant("resnet18=gone.pth")
