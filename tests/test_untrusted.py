"""Checkpoints and weights from others: programs in disguise and altered files are refused."""

import pickle
import shutil
import zipfile
from contextlib import suppress
from functools import partial

import numpy as np
import pytest
import torch
from conftest import RUN, TINY, Program, run_fit

from cifar_transfer import TransferClassifier
from cifar_transfer.base.errors import UserError
from cifar_transfer.commands.embed import main as embed
from cifar_transfer.commands.evaluate import evaluate
from cifar_transfer.commands.export import export
from cifar_transfer.commands.fit import fit
from cifar_transfer.commands.predict import main as predict
from cifar_transfer.commands.serve import main as serve
from cifar_transfer.inference.predictor import Classifier
from cifar_transfer.network.weights_file import read_weights
from cifar_transfer.training.checkpoint_file import load_classifier, read_checkpoint
from cifar_transfer.training.evaluation import load_data

LAST = f"{RUN}/checkpoints/last.ckpt"
MESSAGE = "does not hold the network that it says it does"


def read_last(run):
    return torch.load(run / LAST, weights_only=True)


def disguised(run, disguise, program):
    """Return a program alone, or within a checkpoint of a run."""
    if disguise == "alone":
        return program
    if disguise == "weights":
        return {"state_dict": program, "network": {"backbone": "resnet18"}}
    checkpoint = read_last(run)
    if disguise == "options":
        checkpoint["hyper_parameters"]["lr"] = program
    else:
        checkpoint["callbacks"] = {"Report": program}
    return checkpoint


@pytest.mark.parametrize("call", ["open", "system"])
@pytest.mark.parametrize("disguise", ["alone", "weights", "options", "callbacks"])
def test_a_program_as_a_checkpoint_or_as_weights_is_refused(tmp_path, run, program, disguise, call):
    for name in ("w.ckpt", "w.pth"):
        path = program(tmp_path / name, call, partial(disguised, run, disguise))
        for read in (
            read_checkpoint,
            TransferClassifier.load_from_checkpoint,
            Classifier.load,
            read_weights,
        ):
            with pytest.raises(UserError, match="not opened"):
                read(path)


def save_as_pickle(path, content):
    path.write_bytes(pickle.dumps(content, protocol=2))


def save_as_torch_before_1_6(path, content):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def save_as_numpy(path, content):
    with path.open("wb") as file:
        np.save(file, np.array([content], dtype=object))


@pytest.mark.parametrize("save", [save_as_pickle, save_as_torch_before_1_6, save_as_numpy])
@pytest.mark.parametrize(
    "name", ["w.ckpt", "w.pth", "w.pt2", "w.pth.tar", "w.safetensors", "w.bin"]
)
def test_a_program_in_an_older_or_another_format_is_refused(tmp_path, save, name):
    marker = tmp_path / "it was run"
    path = tmp_path / name
    save(path, {"state_dict": Program(marker), "network": {"backbone": "resnet18"}})
    for read in (TransferClassifier.load_from_checkpoint, read_weights):
        with pytest.raises(UserError, match=r"not opened|cannot be read"):
            read(path)
    assert not marker.exists()


COMMANDS = {
    "fit --resume": lambda path: fit([f"--resume={RUN}"]),
    "fit --ckpt_path": lambda path: fit([*TINY, f"--ckpt_path={path}"]),
    "fit --model.weights": lambda path: fit([*TINY, f"--model.weights={path}"]),
    "evaluate": evaluate,
    "predict": lambda path: predict(["x.png", f"--ckpt={path}"]),
    "export": lambda path: export(path, "onnx"),
    "embed": lambda path: embed(["x.png", "--out=x.npz", f"--ckpt={path}"]),
    "serve": lambda path: serve([f"--ckpt={path}", "--port=0"]),
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_no_command_runs_a_program(tmp_path, monkeypatch, run, program, command):
    shutil.copytree(run / "lightning_logs", tmp_path / "lightning_logs")
    path = program(tmp_path / LAST, inside=partial(disguised, run, "callbacks"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="not opened"):
        command(str(path))


def test_a_program_as_a_command_ends_with_a_sentence_and_status_2(tmp_path, program):
    path = program(tmp_path / "w.ckpt", call="system")
    done = run_fit(tmp_path, f"--ckpt={path}", command="evaluate", expect=2)
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def save_with_other_storages(run, path, change):
    """Write the archive of a checkpoint anew, with other bytes for its tensors."""
    with zipfile.ZipFile(run / LAST) as archive, zipfile.ZipFile(path, "w") as altered:
        for name in archive.namelist():
            content = archive.read(name)
            if "/data/" in name:
                content = change(content)
            altered.writestr(name, content)


def test_a_checkpoint_whose_tensors_are_cut_is_refused(tmp_path, run):
    path = tmp_path / "w.ckpt"
    save_with_other_storages(run, path, lambda content: content[: len(content) // 2])
    with pytest.raises(UserError, match="cannot be read"):
        TransferClassifier.load_from_checkpoint(path)


def test_a_checkpoint_whose_tensors_have_more_bytes_is_refused_or_read(tmp_path, run):
    path = tmp_path / "w.ckpt"
    save_with_other_storages(run, path, lambda content: content + bytes(1000))
    with suppress(UserError):
        TransferClassifier.load_from_checkpoint(path)


@pytest.mark.parametrize("read", [load_classifier, TransferClassifier.load_from_checkpoint])
@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(1).expand(10**12), torch.zeros(1).as_strided((10**6, 10**6), (0, 0))],
    ids=["expanded", "strided"],
)
def test_a_tensor_that_stands_for_more_than_memory_holds_is_refused(tmp_path, run, tensor, read):
    checkpoint = read_last(run)
    name = next(iter(checkpoint["state_dict"]))
    checkpoint["state_dict"][name] = tensor
    torch.save(checkpoint, tmp_path / "w.ckpt")
    with pytest.raises(UserError, match=rf"w\.ckpt {MESSAGE}"):
        read(tmp_path / "w.ckpt")


@pytest.mark.parametrize("read", [load_classifier, TransferClassifier.load_from_checkpoint])
def test_weights_of_another_network_than_the_described_one_are_told(tmp_path, run, read):
    checkpoint = read_last(run)
    checkpoint["network"]["backbone"] = "resnet18"
    torch.save(checkpoint, tmp_path / "w.ckpt")
    with pytest.raises(UserError, match=MESSAGE):
        read(tmp_path / "w.ckpt")


def test_options_of_data_that_this_version_lacks_are_named(tmp_path, run):
    checkpoint = read_last(run)
    checkpoint["datamodule_hyper_parameters"]["of_tomorrow"] = 1
    torch.save(checkpoint, tmp_path / "w.ckpt")
    with pytest.raises(UserError, match=r"are not those of this version .*of_tomorrow"):
        load_data(read_checkpoint(tmp_path / "w.ckpt"))


@pytest.mark.parametrize("length", [0, 1, 100, 5000, -1])
def test_a_checkpoint_cut_short_is_told(tmp_path, run, length):
    content = (run / LAST).read_bytes()
    (tmp_path / "w.ckpt").write_bytes(content[:length])
    with pytest.raises(UserError, match="cannot be read"):
        read_checkpoint(tmp_path / "w.ckpt")
