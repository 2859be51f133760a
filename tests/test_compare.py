"""Comparing backbones, and the table of them."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from unittest.mock import Mock

import pytest
from conftest import TINY, run_fit
from PIL import Image

from cifar_transfer.base.errors import UserError
from cifar_transfer.cli.parsers import check_recipe
from cifar_transfer.commands import backbones, compare
from cifar_transfer.network import catalog
from cifar_transfer.network.contestant import contestant, contestants

OPTIONS = [*TINY[2:], "--trainer.max_epochs=2"]
BOTH = ["lenet5=none", "shufflenet_v2_x0_5=none"]


def run(folder, *options, expect=0):
    return run_fit(folder, *options, *OPTIONS, command="compare", expect=expect)


def rows(folder):
    with (folder / "lightning_logs" / "comparison" / "comparison.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_each_is_fitted_once_and_a_failure_loses_nothing(tmp_path, monkeypatch):
    done = run(tmp_path, BOTH[0], "inception_v3=none", BOTH[1], expect=1)
    assert "75 or more" in done.stderr, "why it failed is said"
    lenet, inception, shufflenet = rows(tmp_path)
    assert lenet["network"] == "lenet5, from scratch"
    assert inception["network"] == "inception_v3, from scratch: failed with exit status 2"
    assert not inception["images/s"]
    for row, parameters in ((lenet, "0.06"), (shufflenet, "0.35")):
        assert row["parameters (M)"] == parameters
        assert 0 <= float(row["test accuracy (%)"]) <= 100
        assert float(row["images/s"]) > 1
    home = tmp_path / "lightning_logs" / "comparison"
    table = (home / "comparison.md").read_text()
    assert "--- " not in done.stdout, "what the runs say is in their logs"
    assert (home / "lenet5-from-scratch" / "fit.log").read_text().count("  2/2  ") == 1
    heading, *shown = done.stdout.splitlines()[2:6]
    assert heading.split() == ["network", "val", "%", "test", "%", "minutes"]
    assert [line.split()[0] for line in shown] == [
        "lenet5,",
        "inception_v3,",
        "shufflenet_v2_x0_5,",
    ]
    assert shown[1].endswith("  failed with exit status 2")
    for line, row in ((shown[0], lenet), (shown[2], shufflenet)):
        assert line.split()[3:] == [row[name] for name in compare.SHOWN.values()]
        assert len(line) == len(heading) < 80
    assert len({len(line) for line in table.splitlines()}) == 1, "its columns line up"
    with Image.open(home / "comparison.png") as figure:
        assert figure.size[0] > 800
        assert len(figure.convert("RGB").getcolors(2**24)) > 50, "something is drawn"

    started = []
    monkeypatch.setattr(
        compare.subprocess,
        "run",
        lambda command, **_: started.append(command) or Mock(returncode=3),
    )
    three = contestants([BOTH[0], "inception_v3=none", BOTH[1]])
    again = compare.compare(three, OPTIONS, home)
    (command,) = started
    assert "--model.backbone=inception_v3" in command, (
        "what failed is tried again, and nothing else"
    )
    assert "--resume" not in command, "a refused start has left no run"
    assert again[1]["failed"] == "failed with exit status 3"
    assert [again[0]["images_per_second"], again[2]["images_per_second"]] == [
        pytest.approx(float(row["images/s"]), abs=0.5) for row in (lenet, shufflenet)
    ]
    with pytest.raises(UserError, match="another recipe"):
        compare.compare(three, [*OPTIONS, "--model.lr=0.5"], home)


@pytest.mark.whole
def test_a_comparison_that_was_killed_continues(tmp_path):
    options = [BOTH[1], *OPTIONS[:-1], "--trainer.max_epochs=20"]
    process = subprocess.Popen(
        [sys.executable, "-m", "cifar_transfer", "compare", *options],
        cwd=tmp_path,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    home = (
        tmp_path
        / "lightning_logs"
        / "comparison"
        / "shufflenet_v2_x0_5-from-scratch"
        / "lightning_logs"
    )
    deadline = time.monotonic() + 200
    while not (home / "version_0" / "checkpoints" / "last.ckpt").is_file():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = run_fit(tmp_path, *options, command="compare")
    assert "minutes" in done.stdout
    log = (home.parent / "fit.log").read_text()
    assert [log.count(f"{epoch:>2}/20  ") for epoch in (1, 20)] == [1, 1]
    assert [path.name for path in home.iterdir()] == ["version_0"], "continued, not begun again"
    result = json.loads((home / "version_0" / "result.json").read_text())
    assert result["epochs"] == 20
    assert f"{result['images_per_second']:.0f}" == rows(tmp_path)[0]["images/s"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["resnet81"], "did you mean resnet18"),
        (["resnet18=gone.pth"], "neither a file nor a name of resnet18's weights"),
        (["lenet5=none", "lenet5=none"], "name each once"),
        (["lenet5=none", "--config", "gone.yaml"], "gone.yaml is neither a file nor a recipe"),
        (["lenet5=none", "--out=file/runs"], "--out file/runs cannot be made a folder"),
    ],
)
def test_mistakes_get_a_sentence(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=message) as error:
        compare.main(options)
    assert "\n" not in str(error.value)


def test_two_files_of_one_name_are_not_taken_for_one(tmp_path, monkeypatch):
    home = tmp_path / "cmp"
    for run in ("a", "b"):
        path = tmp_path / run / "lightning_logs" / "version_0" / "checkpoints" / "best.ckpt"
        path.parent.mkdir(parents=True)
        path.touch()
    one, other = (
        contestant(f"lenet5={tmp_path / run}/lightning_logs/version_0/checkpoints/best.ckpt")
        for run in "ab"
    )
    assert one.folder == other.folder == "lenet5-version_0-best"
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: Mock(returncode=1))
    assert "failed" in compare.compare([one], [], home)[0]
    with pytest.raises(
        UserError,
        match=r"lenet5-version_0-best holds results of another recipe .*: name another folder",
    ):
        compare.compare([other], [], home)


def test_all_recipes_are_taken(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        compare, "compare", lambda backbones, options, out: seen.extend(options) or []
    )
    compare.main(
        [
            "lenet5=none",
            "--config",
            "fast",
            "--config=scratch",
            "--out",
            str(tmp_path),
            "--model.lr=1e-3",
        ]
    )
    assert [option.rpartition("/")[2] for option in seen] == [
        "fast.yaml",
        "scratch.yaml",
        "--model.lr=1e-3",
    ]


@pytest.mark.parametrize("content", ["no json", "{}"])
def test_a_recipe_of_somebody_else_is_another(tmp_path, content):
    assert check_recipe(tmp_path, ["--config={trainer: {max_epochs: 2}}"]) == {
        "options": ["--config={trainer: {max_epochs: 2}}"],
        "config": [],
    }
    (tmp_path / "recipe.json").write_text(content)
    with pytest.raises(UserError, match="holds results of another recipe"):
        check_recipe(tmp_path, [])


def test_contestants(tmp_path):
    (tmp_path / "mine.pth").touch()
    one = contestant(f"resnet18={tmp_path / 'mine.pth'}")
    assert (one.label, one.folder) == ("resnet18, mine", "resnet18-mine")
    assert one.options == ["--model.backbone=resnet18", f"--model.weights={tmp_path / 'mine.pth'}"]
    (tmp_path / "resnet18-tiny.pth").touch()
    assert contestant(f"resnet18={tmp_path / 'resnet18-tiny.pth'}").label == "resnet18, tiny"
    scratch = contestant("resnet18=none")
    never = ["--freeze.unfreeze_epoch=0", "--freeze.phases=null", "--freeze.probe=false"]
    assert scratch.options[1:] == ["--model.weights=none", *never]
    assert contestant("resnet18").options == ["--model.backbone=resnet18"]
    with pytest.raises(UserError, match="Two of the backbones have one name"):
        contestants(["resnet18=none", "lenet5=none", "resnet18=none"])
    pytest.importorskip("timm", reason="timm is an optional extra")
    assert contestant("timm/vit_tiny_patch16_224").folder == "timm-vit_tiny_patch16_224-pretrained"


@pytest.fixture
def table(capsys):
    def run(*options):
        backbones.main(options)
        return capsys.readouterr().out

    return run


def test_the_table_of_backbones(table):
    lines = table("resnet?8").splitlines()
    assert [cell.strip() for cell in lines[2].split("|")[1:7]] == [
        *("resnet18", "11.69", "30.24", "10.92", "224", "IMAGENET1K_V1")
    ]
    assert lines[3] == ""
    listed = json.loads(table("--json"))
    assert {row["name"] for row in listed} == {"lenet5", *catalog.TORCHVISION}
    assert next(row for row in listed if row["name"] == "lenet5")["native"] == 32
    with pytest.raises(UserError, match="No backbone is named like 'resnet81'"):
        table("resnet81")


def test_what_timm_does_not_say_is_left_blank(table):
    pytest.importorskip("timm", reason="timm is an optional extra")
    row = backbones.describe("timm/mobilenetv1_100")
    assert (row["parameters"], row["native"]) == (None, 224)
    assert row["licence_or_source"] == "apache-2.0"
    assert row["weights"][0] == "ra4_e3600_r224_in1k"
    assert "augreg_in21k" in backbones.describe("timm/vit_base_patch16_224")["weights"]
    cells = [cell.strip() for cell in table("timm/mobilenetv1_100").splitlines()[2].split("|")[1:6]]
    assert cells == ["timm/mobilenetv1_100", "", "", "", "224"]


def test_details(table):
    text = table("--detail", "resnet18")
    for expected in (
        "head    fc: Linear(in_features=512, out_features=10",
        "frozen  11,176,512 of 11,181,642 parameters",
        "conv1: 3x3 stride 1 from 7x7 stride 2",
        "small_images=true, at 32 pixels",
    ):
        assert expected in text
    with pytest.raises(UserError, match="There is no backbone 'resnet81'"):
        table("--detail", "resnet81")


def test_an_image_size_that_cannot_be_is_said():
    with pytest.raises(
        UserError, match=r"^inception_v3 cannot take images of 40 pixels: set image_size=75 or more"
    ):
        backbones.detail("inception_v3", 40)
