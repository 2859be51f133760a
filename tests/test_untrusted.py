"""Checkpoints and weights from others: programs in disguise are refused, other versions say what changed."""

import io
import pickle
import shutil
import zipfile
from contextlib import suppress

import numpy as np
import pytest
import torch
from conftest import RUN, TINY, Program, run_fit, weights

import cifar_transfer
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
from cifar_transfer.training.checkpoint_file import read_checkpoint
from cifar_transfer.training.evaluation import load_data


def disguises(run, program):
    """A program alone, one as the weights of a checkpoint, one among the options of an otherwise whole checkpoint."""
    whole = torch.load(run / RUN / "checkpoints/last.ckpt", weights_only=True)
    return {
        "alone": lambda it: it,
        "weights": lambda it: {"state_dict": it, "hyper_parameters": {"backbone": "resnet18"}},
        "options": lambda it: whole | {"hyper_parameters": whole["hyper_parameters"] | {"lr": it}},
        "callbacks": lambda it: whole | {"callbacks": {"Report": it}},
    }


@pytest.mark.parametrize("call", ["open", "system"])
@pytest.mark.parametrize("disguise", ["alone", "weights", "options", "callbacks"])
def test_a_program_as_a_checkpoint_or_as_weights_is_refused(tmp_path, run, program, disguise, call):
    inside = disguises(run, program)[disguise]
    for name in ("w.ckpt", "w.pth"):
        path = program(tmp_path / name, call, inside)
        for read in (
            read_checkpoint,
            TransferClassifier.load_from_checkpoint,
            Classifier.load,
            read_weights,
        ):
            with pytest.raises(UserError, match="not opened"):
                read(path)


FORMATS = {
    "pickle": lambda path, it: path.write_bytes(pickle.dumps(it)),
    "before 1.6": lambda path, it: torch.save(it, path, _use_new_zipfile_serialization=False),
    "numpy": lambda path, it: path.write_bytes(
        io_bytes(lambda file: np.save(file, np.array([it], dtype=object)))
    ),
}


def io_bytes(write):
    file = io.BytesIO()
    write(file)
    return file.getvalue()


@pytest.mark.parametrize("write", FORMATS.values(), ids=FORMATS)
def test_a_program_in_an_older_or_another_format_is_refused(tmp_path, write):
    marker = tmp_path / "it was run"
    for name in ("w.ckpt", "w.pth", "w.pt2", "w.pth.tar", "w.safetensors", "w.bin"):
        write(
            tmp_path / name,
            {"state_dict": Program(marker), "hyper_parameters": {"backbone": "resnet18"}},
        )
        for read in (TransferClassifier.load_from_checkpoint, read_weights):
            with pytest.raises(UserError, match=r"not opened|cannot be read"):
                read(tmp_path / name)
    assert not marker.exists()


COMMANDS = {
    "fit --resume": lambda bad: fit([f"--resume={RUN}"]),
    "fit --ckpt_path": lambda bad: fit([*TINY, f"--ckpt_path={bad}"]),
    "fit --model.weights": lambda bad: fit([*TINY, f"--model.weights={bad}"]),
    "evaluate": evaluate,
    "predict": lambda bad: predict(["x.png", f"--ckpt={bad}"]),
    "export": lambda bad: export(bad, "onnx"),
    "embed": lambda bad: embed(["x.png", "--out=x.npz", f"--ckpt={bad}"]),
    "serve": lambda bad: serve([f"--ckpt={bad}", "--port=0"]),
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_no_command_runs_a_program(tmp_path, monkeypatch, run, program, command):
    shutil.copytree(run / "lightning_logs", tmp_path / "lightning_logs")
    bad = program(
        tmp_path / RUN / "checkpoints/last.ckpt", inside=disguises(run, program)["callbacks"]
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="not opened"):
        command(str(bad))


def test_a_program_as_a_command_ends_with_a_sentence_and_status_2(tmp_path, program):
    bad = program(tmp_path / "w.ckpt", call="system")
    done = run_fit(tmp_path, f"--ckpt={bad}", command="evaluate", expect=2)
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_a_checkpoint_of_the_first_version_is_used_and_continued(tmp_path, run):
    """Which knew fewer options, and no `Report`."""
    shutil.copytree(run / "lightning_logs", tmp_path / "lightning_logs")
    path = tmp_path / RUN / "checkpoints/last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    later = "momentum warmup_epochs patch_size aux_weight schedule ema compile label_smoothing small_images head_lr"
    for name in [*later.split(), "train_sizes", "optimizer"]:
        del checkpoint["hyper_parameters"][name]
    del checkpoint["datamodule_hyper_parameters"]["augment"]["padding_mode"]
    del checkpoint["callbacks"]["Report"]
    torch.save(checkpoint, path)
    assert "test/acc" in evaluate(str(path), figures=False)
    done = run_fit(tmp_path, f"--resume={RUN}", "--trainer.max_epochs=2")
    assert "  2/2  " in done.stdout
    assert "Traceback" not in done.stderr
    assert weights(path)


def lying(run, path, change):
    """A checkpoint whose zip file is written anew, with one member changed."""
    with (
        zipfile.ZipFile(run / RUN / "checkpoints/last.ckpt") as old,
        zipfile.ZipFile(path, "w") as new,
    ):
        for member in old.infolist():
            change(new, member, old.read(member))


def cut(new, member, content):
    """Half of each storage, and the sizes of the tensors as before."""
    new.writestr(
        member.filename, content[: len(content) // 2] if "/data/" in member.filename else content
    )


def long(new, member, content):
    new.writestr(member.filename, content + bytes(1000) if "/data/" in member.filename else content)


@pytest.mark.parametrize(
    ("change", "outcome"),
    [
        (cut, pytest.raises(UserError, match="cannot be read")),
        (long, suppress(UserError)),
    ],
)
def test_a_checkpoint_whose_parts_have_other_sizes_is_refused_or_read(
    tmp_path, run, change, outcome
):
    lying(run, tmp_path / "w.ckpt", change)
    with outcome:
        TransferClassifier.load_from_checkpoint(tmp_path / "w.ckpt")


NOT_THAT = "does not hold the network that it says it does"


@pytest.mark.parametrize(
    ("absurd", "says"),
    [
        ("tensor", NOT_THAT),
        ("classes", r"is damaged or was altered: its num_classes cannot be 10{15}\."),
        ("strided", NOT_THAT),
    ],
)
def test_a_checkpoint_of_absurd_sizes_is_refused(tmp_path, run, absurd, says):
    checkpoint = torch.load(run / RUN / "checkpoints/last.ckpt", weights_only=True)
    name = next(iter(checkpoint["state_dict"]))
    if absurd == "classes":
        checkpoint["hyper_parameters"] |= {"num_classes": 10**15, "class_names": None}
    elif absurd == "tensor":
        checkpoint["state_dict"][name] = torch.zeros(1).expand(10**12)
    else:
        checkpoint["state_dict"][name] = torch.zeros(1).as_strided((10**6, 10**6), (0, 0))
    torch.save(checkpoint, tmp_path / "w.ckpt")
    with pytest.raises(UserError, match=rf"w\.ckpt {says}"):
        TransferClassifier.load_from_checkpoint(tmp_path / "w.ckpt")


def test_the_version_is_in_each_checkpoint_and_told_where_it_matters(tmp_path, monkeypatch, run):
    checkpoint = torch.load(run / RUN / "checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["cifar_transfer_version"] == cifar_transfer.__version__
    checkpoint["cifar_transfer_version"] = "9.8.7"
    checkpoint["hyper_parameters"] |= {"of_tomorrow": 1}
    torch.save(checkpoint, tmp_path / "w.ckpt")
    monkeypatch.chdir(tmp_path)
    for name, command in COMMANDS.items():
        if name in ("fit --ckpt_path", "evaluate", "predict", "export"):
            with pytest.raises(UserError, match=r"is of version 9\.8\.7.*of_tomorrow"):
                command("w.ckpt")


@pytest.mark.parametrize("where", ["network", "data"])
def test_a_checkpoint_of_a_later_version_says_what_is_unknown(tmp_path, run, where):
    checkpoint = torch.load(run / RUN / "checkpoints/last.ckpt", weights_only=True)
    key = {"network": "hyper_parameters", "data": "datamodule_hyper_parameters"}[where]
    checkpoint[key] = checkpoint[key] | {"of_tomorrow": 1}
    torch.save(checkpoint, tmp_path / "w.ckpt")
    with pytest.raises(UserError, match="of_tomorrow"):
        load_data(read_checkpoint(tmp_path / "w.ckpt"))


def test_weights_of_another_network_than_the_options_name_are_told(tmp_path, run):
    checkpoint = torch.load(run / RUN / "checkpoints/last.ckpt", weights_only=True)
    checkpoint["hyper_parameters"]["backbone"] = "resnet18"
    torch.save(checkpoint, tmp_path / "w.ckpt")
    with pytest.raises(UserError, match="does not hold the network that it says it does"):
        TransferClassifier.load_from_checkpoint(tmp_path / "w.ckpt")


@pytest.mark.parametrize("length", [0, 1, 100, 5000, -1])
def test_a_checkpoint_cut_short_is_told(tmp_path, run, length):
    whole = (run / RUN / "checkpoints/last.ckpt").read_bytes()
    (tmp_path / "w.ckpt").write_bytes(whole[:length])
    with pytest.raises(UserError, match="cannot be read"):
        read_checkpoint(tmp_path / "w.ckpt")
