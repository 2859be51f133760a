"""The search for a learning rate tells two, draws them, and leaves no other trace."""

import re

import pytest
import torch
from conftest import TINY
from PIL import Image

from cifar_transfer import TransferClassifier
from cifar_transfer.errors import UserError
from cifar_transfer.fit import fit
from cifar_transfer.training import find_lr
from cifar_transfer.training.cli import FitCLI


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["fit"])
    return tmp_path


ONLY_THE_HEAD = ["network.fc.weight", "network.fc.bias"]


def told(output):
    """The options in the printed line."""
    line = re.search(r"^options     (.*)$", output, re.MULTILINE)[1]
    return {name: float(value) for name, value in re.findall(r"(--\S+)=(\S+)", line)}


def test_the_command_tells_two_options_and_leaves_only_the_picture(here, capfd):
    assert fit([*TINY, "--model.backbone=lenet5", "--find_lr", "--trainer.fast_dev_run=true"]) is None
    output, errors = capfd.readouterr()
    found = told(output)
    assert list(found) == ["--model.lr", "--freeze.unfrozen_lr"]
    assert all(find_lr.LOWEST < rate < find_lr.HIGHEST for rate in found.values())
    assert [file.name for file in here.iterdir()] == ["find_lr.png"]
    with Image.open("find_lr.png") as picture:
        assert picture.width > 2 * picture.height, "two panels"
    for noise in ("Finding best", "Warning", "Restor", "stopped"):
        assert noise not in errors


def test_weights_stay_and_the_backbone_rests_while_it_is_frozen(here, monkeypatch):
    monkeypatch.setattr(find_lr, "STEPS", 20)
    copies, deepcopy = [], find_lr.deepcopy
    monkeypatch.setattr(find_lr, "deepcopy", lambda given: copies.append(deepcopy(given)) or copies[-1])
    options = ["--model.optimizer=adamw", "--model.schedule=linear", "--model.head_lr=0.1", "--model.compile=true"]
    cli = FitCLI([*TINY, *options, "--find_lr=true", f"--trainer.default_root_dir={here / 'there'}"])
    before = {name: tensor.clone() for name, tensor in cli.model.state_dict().items()}
    frozen, whole = find_lr.find_lr(cli.trainer, cli.model, cli.datamodule)
    assert all(torch.equal(before[name], tensor) for name, tensor in cli.model.state_dict().items())
    assert all(parameter.requires_grad for parameter in cli.model.parameters())
    assert (frozen.option, whole.option) == ("--model.head_lr", "--freeze.unfrozen_lr")
    assert frozen.rates == whole.rates == sorted(frozen.rates)
    assert (frozen.rates[0], frozen.rates[-1]) == pytest.approx((find_lr.LOWEST, find_lr.HIGHEST))
    assert frozen.losses[0] != whole.losses[0], "batch-norm follows the batch only where it is not frozen"
    assert [file.name for file in (here / "there").iterdir()] == ["find_lr.png"]
    assert not (here / "lightning_logs").exists()
    copies = [copy for copy in copies if isinstance(copy, TransferClassifier)]
    trained = [[name for name, p in copy.named_parameters() if p.requires_grad] for copy in copies]
    assert trained == [ONLY_THE_HEAD, [name for name, _ in cli.model.named_parameters()]]
    assert [copy.network.conv1[1].training for copy in copies] == [False, True]


def test_the_suggestion_is_a_tenth_of_where_the_loss_is_lowest():
    rates = torch.logspace(-6, 0, 100)
    waver = 0.05 * torch.randn(100, generator=torch.Generator().manual_seed(0))
    valley = 2.3 - 2 * torch.exp(-((rates.log10() + 2) ** 2)) + waver
    valley[-8:] = torch.tensor([9, 90, 900, float("inf"), float("nan"), 90, float("inf"), float("nan")])
    smooth, found = find_lr.suggest(rates.tolist(), valley.tolist())
    assert found == pytest.approx(1e-3, rel=0.3)
    assert smooth[:50] == pytest.approx((valley - waver)[:50].tolist(), abs=0.1)
    assert find_lr.suggest(rates.tolist(), (2.3 + waver).tolist())[1] is None


def test_a_run_without_a_freeze_has_one_rate_and_what_is_not_found_is_said(here, monkeypatch, capsys):
    monkeypatch.setattr(find_lr, "STEPS", 5)
    monkeypatch.setattr(find_lr, "HIGHEST", 2e-6)  # where batches differ by more than the loss could fall
    fit([*TINY, "--find_lr", "--freeze.unfreeze_epoch=0"])
    output = capsys.readouterr().out
    assert re.findall("^no rate.*", output, re.MULTILINE) == [
        "no rate     for --model.lr: the loss falls at none from 1e-06 to 2e-06"
    ]
    assert "options" not in output


def test_a_run_that_continues_has_its_rates(here):
    with pytest.raises(UserError, match="leave out --resume"):
        fit([*TINY, "--find_lr", "--ckpt_path=x.ckpt"])
