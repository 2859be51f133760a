"""`~` in the paths of every command: shells leave it in `--option=~/x`, and files have no shell."""

import os
import shutil
from pathlib import Path

import pytest
from conftest import RUN, TINY, write_images

from cifar_transfer.base.errors import UserError
from cifar_transfer.base.files import user_path
from cifar_transfer.cli.features_cli import parser
from cifar_transfer.cli.fit_cli import FitCLI
from cifar_transfer.commands.embed import main as embed
from cifar_transfer.commands.evaluate import evaluate
from cifar_transfer.commands.export import export
from cifar_transfer.commands.figures import figures
from cifar_transfer.commands.predict import main as predict
from cifar_transfer.commands.serve import main as serve
from cifar_transfer.inference import page
from cifar_transfer.inference.sources import image_files

BEST = f"~/{RUN}/checkpoints/best.ckpt"


@pytest.fixture
def home(tmp_path, monkeypatch, run):
    """A home with a run and images; the current folder is another one, and stays empty."""
    home = tmp_path / "home"
    shutil.copytree(run / "lightning_logs", home / "lightning_logs")
    write_images(home, 1, classes=["images"])
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(home))
    yield home
    assert list(Path().iterdir()) == []


def test_names_that_are_no_homes_stay(home):
    assert user_path("~/x") == home / "x"
    assert user_path("~nobody-of-this-name/x") == Path("~nobody-of-this-name/x")
    assert user_path("x/~/y") == Path("x/~/y")


def test_images_in_a_home_are_predicted_and_drawn(home, capsys):
    options = [f"--ckpt={BEST}", "--accelerator=cpu", "--format=csv"]
    files = ["--figure=~/figure.png", "--explain=~/maps"]
    assert predict(["~/images", *options, *files]) == 0
    assert str(home / "images" / "000.png") in capsys.readouterr().out
    assert (home / "figure.png").is_file()
    assert len(list((home / "maps").iterdir())) == 1


def test_a_file_that_is_called_like_a_home_is_itself(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path / "home")
    Path("~").mkdir()
    Path("~", "x.png").touch()
    assert list(image_files(["~/x.png"], pytest.fail)) == ["~/x.png"]
    assert list(image_files(["~/y.png"], pytest.fail)) == [str(home / "y.png")]
    monkeypatch.chdir(tmp_path / "here")


def test_features_are_written_into_a_home(home):
    options = [f"--ckpt={BEST}", "--accelerator=cpu", "--projector=~/projector"]
    assert embed(["~/images", "--out=~/features.npz", *options]) == 0
    assert (home / "features.npz").is_file()
    assert (home / "projector").is_dir()


@pytest.mark.slow
def test_a_run_in_a_home_is_evaluated_drawn_and_exported(home):
    assert "test/acc" in evaluate(BEST, accelerator="cpu", figures=False)
    assert all(path.is_relative_to(home) for path in figures(f"~/{RUN}"))
    export(BEST, "safetensors", out="~/network.safetensors")
    assert (home / "network.safetensors").is_file()


def test_a_page_shows_a_checkpoint_in_a_home(home, monkeypatch, capsys):
    monkeypatch.setattr(page.Page, "serve_forever", lambda self: None)
    serve([f"--ckpt={BEST}", "--port=0", "--accelerator=cpu"])
    assert str(home / BEST[2:]) in capsys.readouterr().out


def test_a_run_in_a_home_is_continued(home):
    options = [*TINY, "--trainer.max_epochs=2", "--freeze.unfreeze_epoch=0"]
    cli = FitCLI([f"--resume=~/{RUN}", "--trainer.max_epochs=2"])
    assert cli.folder.path == home / RUN
    cli.folder.release()
    cli = FitCLI([*options, f"--ckpt_path={BEST}", "--trainer.default_root_dir=~/new"])
    assert cli.ckpt_path == home / BEST[2:]
    cli.folder.release()
    shutil.rmtree("lightning_logs", ignore_errors=True)
    with pytest.raises(UserError, match=rf"--resume {home}/nowhere: there is no"):
        FitCLI(["--resume=~/nowhere"])


@pytest.mark.parametrize("command", ["audit", "probe"])
def test_results_go_into_a_home(home, command):
    options = parser(command, Path("x")).parse_args(["--out=~/out", "--features=~/features"])
    assert options.out == home / "out"
    assert options.features == home / "features"
    assert not os.path.exists("~")
