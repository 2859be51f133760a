"""Runs, caches and archives from others: looked at and continued, and nothing in them is run."""

import ast
import gc
import hashlib
import io
import os
import pickle
import re
import shutil
import subprocess
import tarfile
from contextlib import suppress
from pathlib import Path
from pkgutil import resolve_name

import numpy as np
import pytest
import torch
import yaml
from conftest import RUN, Program, untouched
from torchvision.datasets import CIFAR10

import cifar_transfer
from cifar_transfer.base.errors import UserError
from cifar_transfer.cli.fit_cli import FitCLI
from cifar_transfer.commands.figures import figures
from cifar_transfer.commands.fit import fit
from cifar_transfer.data import cache, cifar
from cifar_transfer.results.predictions import Predictions


def test_a_program_as_the_best_checkpoint_of_a_finished_run_is_refused(
    tmp_path, monkeypatch, run, program
):
    """Which `--resume` tests at once."""
    shutil.copytree(run / "lightning_logs", tmp_path / "lightning_logs")
    best = tmp_path / RUN / "checkpoints/best.ckpt"
    whole = torch.load(best, weights_only=True)
    program(best, inside=lambda it: whole | {"callbacks": {"Report": it}})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"best\.ckpt cannot be read.*not opened"):
        fit([f"--resume={RUN}"])


def test_a_program_as_cached_or_kept_arrays_is_not_run(tmp_path, program):
    marker = tmp_path / "it was run"
    path = tmp_path / "array.npy"
    np.save(path, np.array([Program(marker)], dtype=object), allow_pickle=True)
    with pytest.warns(UserWarning, match="are damaged, and are made again"):
        assert cache._open(path, path) is None, "as if there were no cache"
    np.savez(tmp_path / "predictions.npz", names=np.array([Program(marker)], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle"):
        Predictions.load(tmp_path / "predictions.npz")
    program(tmp_path / "unused.pth")


@pytest.mark.parametrize("where", ["freeze", "report"])
def test_a_run_of_somebody_else_is_drawn_without_running_it(tmp_path, run, where):
    shutil.copytree(run / RUN, tmp_path / "run")
    config = f"{where}: !!python/object/apply:os.system ['touch \"{tmp_path}/it was run\"']\n"
    (tmp_path / "run/config.yaml").write_text(config)
    with pytest.raises(UserError, match="cannot be read as YAML"):
        figures(str(tmp_path / "run"))
    assert not (tmp_path / "it was run").exists()


def test_a_run_whose_predictions_are_damaged_is_not_drawn(tmp_path, run):
    shutil.copytree(run / RUN, tmp_path / "run")
    predictions = tmp_path / "run/figures/predictions-test.npz"
    predictions.write_bytes(predictions.read_bytes()[:3000])
    with pytest.raises(UserError, match="cannot be drawn because a file of it is damaged"):
        figures(str(tmp_path / "run"))


def test_a_resumed_configuration_runs_nothing(tmp_path, monkeypatch, run):
    shutil.copytree(run / "lightning_logs", tmp_path / "lightning_logs")
    config = tmp_path / RUN / "config.yaml"
    monkeypatch.chdir(tmp_path)
    program = f"seed_everything: !!python/object/apply:os.system ['touch {tmp_path}/ran']"
    for text, said in (
        (program, "python/object/apply:os.system"),
        ("data: os.system", r"os\.system"),
        ("][", "config"),
    ):
        config.write_text(f"{text}\n")
        with untouched(tmp_path), pytest.raises(UserError, match=said):
            fit([f"--resume={RUN}"])
    assert not (tmp_path / "ran").exists()


# Where a configuration may name something to import.
NAMED = {
    "data": "data: {class_path: evil.Class}",
    "callback": "trainer: {callbacks: [{class_path: evil.Class}]}",
    "logger": "trainer: {logger: {class_path: evil.Class}}",
    "a function of Lightning's": (
        "trainer: {callbacks: [{class_path: LambdaCallback, init_args: {on_fit_start: evil.f}}]}"
    ),
    "in a file": "data: evil.yaml",
    "in text": """data: '{"class_path": "evil.Class"}'""",
    "of the library": (
        "trainer: {callbacks: [{class_path: subprocess.Popen, init_args: {args: [touch, ran]}}]}"
    ),
    "under another name": (
        "trainer: {plugins: [{class_path: cifar_transfer.cli.fit_process.subprocess.Popen}]}"
    ),
}


@pytest.mark.parametrize("text", NAMED.values(), ids=NAMED)
def test_a_resumed_configuration_imports_nothing_else(tmp_path, monkeypatch, run, text):
    shutil.copytree(run / "lightning_logs", tmp_path / "lightning_logs")
    (tmp_path / RUN / "config.yaml").write_text(f"{text}\n")
    for folder in (tmp_path, tmp_path / RUN):
        (folder / "evil.py").write_text("open('ran', 'w')\ndef f(*_): pass\nclass Class: pass\n")
        (folder / "evil.yaml").write_text("class_path: evil.Class\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # as `python -m` does
    for name in re.findall(r"[\w.]+\.Popen", text):
        assert resolve_name(name) is subprocess.Popen, "there is something to refuse"
    with untouched(tmp_path), pytest.raises(UserError, match=r"evil|subprocess\.Popen"):
        fit([f"--resume={RUN}"])


def test_a_resumed_configuration_may_name_lightnings_classes_and_what_the_command_line_names(
    tmp_path, monkeypatch, run
):
    shutil.copytree(run / "lightning_logs", tmp_path / "lightning_logs")
    config = tmp_path / RUN / "config.yaml"
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine.py").write_text(
        "from cifar_transfer import ShapesDataModule\nclass Mine(ShapesDataModule):\n    pass\n"
    )
    text = config.read_text().replace("cifar_transfer.ShapesDataModule", "mine.Mine")
    last = tmp_path / RUN / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(last, weights_only=True)
    checkpoint["datamodule_hyper_parameters"]["data"] = "Mine"
    assert "mine.Mine" in text
    stopping = (
        "{class_path: lightning.pytorch.callbacks.EarlyStopping, init_args: {monitor: val/loss}}"
    )
    text = text.replace("callbacks: null", f"callbacks: [{stopping}]")
    config.write_text(text)
    checkpoint["callbacks"]["RunFolder"]["config"] = yaml.safe_load(text)
    torch.save(checkpoint, last)
    with pytest.raises(
        UserError, match=r"mine\.Mine.*not allowed.*name it on the command line too"
    ):
        FitCLI([f"--resume={RUN}"])
    cli = FitCLI([f"--resume={RUN}", "--data=mine.Mine"])
    assert type(cli.datamodule).__module__ == "mine"
    assert "EarlyStopping" in {type(callback).__name__ for callback in cli.trainer.callbacks}


@pytest.mark.whole
def test_a_run_with_damaged_curves_is_drawn_or_refused_and_continued(tmp_path, monkeypatch, run):
    """What an event file holds is read up to the first record that is none."""
    shutil.copytree(run / "lightning_logs", tmp_path / "lightning_logs")
    events, *_ = sorted((tmp_path / RUN).glob("events.out.tfevents.*"))
    whole = events.read_bytes()
    monkeypatch.chdir(tmp_path)
    for content in (
        b"",
        os.urandom(5000),
        pickle.dumps(Program(tmp_path / "ran")),
        whole[:-7],
        whole[:500] + bytes(900),
    ):
        events.write_bytes(content)
        with suppress(UserError):
            figures(RUN)
        FitCLI([f"--resume={RUN}"])
        gc.collect()  # its lock on the run goes with it
    assert not (tmp_path / "ran").exists()


def test_an_archive_writes_nothing_outside_its_folder(tmp_path, monkeypatch):
    """It has the expected MD5 sum, and members that point elsewhere."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        for name in ("../../evil", "/tmp/evil-of-an-archive", f"{cifar.BATCHES}/../../evil"):
            member = tarfile.TarInfo(name)
            member.size = 4
            archive.addfile(member, io.BytesIO(b"evil"))
        link = tarfile.TarInfo(f"{cifar.BATCHES}/data_batch_1")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    path = tmp_path / "deep" / "er" / cifar.ARCHIVE
    path.parent.mkdir(parents=True)
    path.write_bytes(content.getvalue())
    monkeypatch.setattr(cifar, "ARCHIVE_MD5", hashlib.md5(content.getvalue()).hexdigest())
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(KeyError, match="/etc/passwd"):  # which is no member
        cifar._read(path, "test")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_program_in_an_archive_that_passes_for_the_official_one_is_not_run(tmp_path, monkeypatch):
    """The MD5 sum of each file in it is compared too."""
    content = io.BytesIO()
    program = pickle.dumps(Program(tmp_path / "it was run"))
    names = [name for name, _ in CIFAR10.train_list + CIFAR10.test_list]
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        for name in [*names, CIFAR10.meta["filename"]]:
            member = tarfile.TarInfo(f"{cifar.BATCHES}/{name}")
            member.size = len(program)
            archive.addfile(member, io.BytesIO(program))
    path = tmp_path / cifar.ARCHIVE
    path.write_bytes(content.getvalue())
    monkeypatch.setattr(cifar, "ARCHIVE_MD5", hashlib.md5(content.getvalue()).hexdigest())
    with pytest.raises(UserError, match=r"data_batch_1 is not the official file"):
        cifar._read(path, "test")
    assert not (tmp_path / "it was run").exists()


SAFE = {
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "TransferClassifier.load_from_checkpoint": (None, None),  # of this project, and safe by default
}


# What runs what it is given, or unpacks where the packer wished.
FORBIDDEN = {
    *(
        "eval",
        "exec",
        "compile",
        "os.system",
        "os.popen",
        "yaml.load",
        "yaml.unsafe_load",
        "yaml.full_load",
    ),
    *(
        "pickle.load",
        "pickle.loads",
        "torch.jit.load",
        "torch.hub.load",
        "joblib.load",
        "shutil.unpack_archive",
    ),
}


def test_no_call_in_the_project_opens_what_could_be_a_program():
    found = set()
    for path in Path(cifar_transfer.__file__).parent.rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if not isinstance(call, ast.Call):
                continue
            name = ast.unparse(call.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            assert name not in FORBIDDEN, f"{path}:{call.lineno}"
            assert not name.endswith((".extractall", ".extract")), f"{path}:{call.lineno}"
            assert keywords.get("shell") in (None, "False"), f"{path}:{call.lineno}"
            if name in SAFE and SAFE[name][0]:
                found.add(name)
                assert keywords.get(SAFE[name][0]) == str(SAFE[name][1]), f"{path}:{call.lineno}"
    assert found == {"torch.load", "np.load"}
