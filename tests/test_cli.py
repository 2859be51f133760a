"""The commands as users run them: a whole job, evaluation, and a sentence for every mistake."""

import re
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from conftest import TINY, run_fit, write_images
from lightning.pytorch.callbacks import ProgressBar
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.metadata import parse_experiment_plugin_data

from cifar_transfer.base.errors import UserError, one_sentence
from cifar_transfer.commands import demo
from cifar_transfer.commands.evaluate import evaluate
from cifar_transfer.commands.figures import figures
from cifar_transfer.commands.fit import fit
from cifar_transfer.data.augment_options import Augment
from cifar_transfer.training.checkpoint_file import newest_checkpoint
from cifar_transfer.training.report import Report

RUN = "lightning_logs/version_0"


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A finished run, and what it printed."""
    folder = tmp_path_factory.mktemp("job")
    options = [
        "--trainer.max_epochs=3",
        "--freeze.unfreeze_epoch=1",
        "--trainer.log_every_n_steps=1",
    ]
    options += ["--report.figures=true"]
    return folder, run_fit(folder, *TINY, *options)


def test_a_run_prints_a_line_an_epoch_and_what_to_do_next(job):
    _, done = job
    lines = done.stdout.splitlines()
    table = lines.index(
        "epoch  train loss  train acc  val loss  val acc         lr    time      left"
    )
    frozen, first, unfrozen, *others = lines[table + 1 : table + 6]
    assert frozen == "Epoch 1: backbone frozen, 10,250 parameters train."
    assert unfrozen == "Epochs 2 to 3: everything at rate 0.0001, 352,042 parameters train."
    row = r" +{}/3 +\d\.\d{{3}} +[\d.]+% +\d\.\d{{3}} +[\d.]+% [ *] +{} +[\d.]+ s{}"
    for number, (line, rate, left) in enumerate(
        zip(
            (first, *others),
            ("0.001", "0.0001", "0.0001"),
            (r" +> \d+ s", r" +\d+ s", ""),
            strict=True,
        ),
        1,
    ):
        assert re.fullmatch(row.format(number, rate, left), line), line
    assert re.search(r"^test accuracy +[\d.]+%$", done.stdout, re.MULTILINE)
    best = max(
        range(3), key=lambda number: float(re.findall(r"[\d.]+(?=%)", (first, *others)[number])[1])
    )
    assert f"checkpoint     the best, of epoch {best + 1}" in lines
    assert f"run            {RUN}" in lines
    assert "look at it     tensorboard --logdir lightning_logs" in lines
    assert "predict        python -m cifar_transfer predict IMAGE" in lines
    assert "Warning" not in done.stderr
    assert "warn(" not in done.stderr


def test_tensorboard_has_curves_against_the_epoch_the_graph_and_the_hyperparameters(job):
    folder, done = job
    events = EventAccumulator(str(folder / RUN), size_guidance={"scalars": 0})
    events.Reload()
    steps = {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    for tag in (
        "accuracy/train",
        "loss/train",
        "accuracy/val",
        "loss/val",
        "lr",
        "trainable_parameters",
    ):
        assert steps[tag] == [1, 2, 3], tag
    for tag in ("loss/train_step", "accuracy/train_step"):
        assert steps[tag] == list(range(18)), "180 images in batches of 32, three times"
    assert steps["accuracy/val_step"] == [5, 11, 17]
    groups = list(
        dict.fromkeys(tag.partition("/")[0] for tag in sorted([*steps, *events.Tags()["images"]]))
    )
    assert groups[:2] == ["accuracy", "loss"], "TensorBoard opens the first two"
    assert [event.value for event in events.Scalars("lr")] == pytest.approx([1e-3, 1e-4, 1e-4])
    assert [event.value for event in events.Scalars("trainable_parameters")] == [
        10250,
        352042,
        352042,
    ]
    assert events.Tags()["graph"]
    printed = float(re.search(r"test accuracy +([\d.]+)%", done.stdout)[1]) / 100
    assert events.Scalars("result/test_acc")[-1].value == pytest.approx(printed, abs=1e-4)
    hparams = events.summary_metadata
    options = parse_experiment_plugin_data(
        hparams["_hparams_/experiment"].plugin_data.content
    ).hparam_infos
    first = ["Backbone", "Batch size", "Learning rate", "Optimizer", "Weights"]
    assert sorted(option.name for option in options)[:5] == first, "which TensorBoard shows"


OF_PREDICTIONS = ("confusion", "classes", "reliability", "mistakes", "correct")
FIGURES = {"augmented", "iterations", "epochs", *(f"test-{name}" for name in OF_PREDICTIONS)}


def test_a_run_leaves_its_figures_and_draws_them_again(job):
    folder, done = job
    pictures = folder / RUN / "figures"
    assert (
        "The augmented images: lightning_logs/version_0/figures/augmented.png"
        in done.stdout.splitlines()
    )
    before = {name: (pictures / f"{name}.png").read_bytes() for name in FIGURES}
    for name in FIGURES - {"augmented"}:
        (pictures / f"{name}.png").unlink()
    out = run_fit(folder, RUN, command="figures").stdout
    assert f"{RUN}/figures/test-mistakes.png" in out.splitlines()
    assert {name: (pictures / f"{name}.png").read_bytes() for name in FIGURES} == before
    with pytest.raises(UserError, match="name a run's folder"):
        figures("nowhere")


def test_tensorboard_has_figures_layout_and_configuration(job):
    folder, _ = job
    events = EventAccumulator(str(folder / RUN))
    events.Reload()
    assert {f"plots/{name}" for name in FIGURES} <= set(events.Tags()["images"])
    assert {"custom_scalars__config__", "config.yaml/text_summary"} <= set(events.Tags()["tensors"])
    assert "shufflenet_v2_x0_5" in str(
        events.Tensors("config.yaml/text_summary")[0].tensor_proto.string_val
    )


@pytest.mark.slow
def test_the_configuration_of_a_run_is_beside_it_and_runs_again(job, tmp_path):
    folder, done = job
    config = yaml.safe_load((folder / RUN / "config.yaml").read_text())
    assert config["freeze"]["unfreeze_epoch"] == 1
    again = run_fit(tmp_path, "--config", folder / RUN / "config.yaml")
    accuracies = [
        re.findall(r"(?:val|test) accuracy +[\d.]+%", output)
        for output in (done.stdout, again.stdout)
    ]
    assert accuracies[0] == accuracies[1]


@pytest.mark.slow
def test_evaluate_gives_the_figures_of_the_run(job, monkeypatch, capsys):
    folder, done = job
    monkeypatch.chdir(folder)
    for split in ("test", "val"):
        evaluate(f"{RUN}/checkpoints/best.ckpt", split)
        expected = re.search(rf"{split} accuracy +([\d.]+%)", done.stdout)[1]
        assert f"{split}/acc  {expected}" in capsys.readouterr().out
        assert all(
            (folder / RUN / "figures" / f"{split}-{name}.png").is_file() for name in OF_PREDICTIONS
        )


@pytest.mark.slow
def test_no_weights_are_fetched_to_use_or_continue_a_checkpoint(job, tmp_path):
    """A run that claims ImageNet weights goes on where there is neither network nor cache."""
    folder, _ = job
    checkpoint = torch.load(folder / RUN / "checkpoints" / "last.ckpt", weights_only=True)
    checkpoint["hyper_parameters"]["weights"] = "DEFAULT"
    checkpoint["callbacks"]["RunFolder"]["config"]["model"]["weights"] = "DEFAULT"
    torch.save(checkpoint, tmp_path / "x.ckpt")
    evaluate(str(tmp_path / "x.ckpt"), figures=False)
    options = [option for option in TINY if "weights" not in option]
    options += ["--freeze.unfreeze_epoch=1", "--ckpt_path=x.ckpt", "--trainer.max_epochs=4"]
    run_fit(tmp_path, *options)
    last = torch.load(tmp_path / RUN / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["hyper_parameters"]["weights"] == "DEFAULT", "as given"


@pytest.mark.slow
def test_own_images_run_end_to_end_without_test_images(tmp_path):
    write_images(tmp_path / "photos" / "train", 12, size=(24, 24), classes=["cat", "dog", "猫"])
    options = [
        "--data=ImageFolderDataModule",
        "--data.root=photos",
        "--data.batch_size=8",
        "--trainer.max_epochs=1",
    ]
    done = run_fit(
        tmp_path, "--model.backbone=shufflenet_v2_x0_5", "--model.weights=none", *options
    )
    assert re.search(r"^ +1/1 +\d", done.stdout, re.MULTILINE), (
        "also of fewer steps than between two lines of the log"
    )
    assert "val accuracy" in done.stdout
    assert "test accuracy" not in done.stdout
    best = f"--ckpt={RUN}/checkpoints/best.ckpt"
    done = run_fit(tmp_path, best, command="evaluate", expect=2)
    assert "There are no test images" in done.stderr


MISTAKES = [
    (["--model.backbone=resnet81"], "did you mean resnet18"),
    (["--model.weights=/nowhere/w.pth"], "neither a file nor a name"),
    (["--model.num_classes=5"], "num_classes is 5, but the data have 10 classes"),
    (["--trainer.default_root_dir=/dev/null"], "cannot be written"),
    (
        ["--data=NoSuchModule"],
        "--data=NoSuchModule names no data module. Data modules: CIFAR10DataModule, Ima",
    ),
    (["--data=ImageFolderDataModule", "--data.root=/nowhere"], "/nowhere/train is missing"),
    (
        ["--model.learning_rate=0.1"],
        "There is no option --model.learning_rate: did you mean --model.lr?",
    ),
    (["--model.backbon=resnet18"], "did you mean --model.backbone?"),
    (["--data.augment.flp=0.3"], "did you mean --data.augment.flip?"),
    (["--data.augment.fli=0.3"], "did you mean --data.augment.flip?"),
    (["--data.batch_siz=3"], "'batch_siz' is not accepted (Did you mean batch_size"),
    (
        ["--trainer.callbacks=EarlyStopping"],
        '"trainer.callbacks": the following arguments are required: monitor',
    ),
    (["--trainer.callbacks+=cifar_transfer.Nothing"], "has no attribute 'Nothing'"),
    (["--trainer.max_epochs=1.5"], "--trainer.max_epochs takes int or null, not 1.5"),
    (
        ["--model.backbone=lenet5", "--model.weights=DEFAULT"],
        "with --model.weights=none and --freeze.unfreeze_epoch=0",
    ),
    pytest.param(
        ["--trainer.logger=WandbLogger"],
        "pip install -U 'wandb",
        marks=pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed"),
    ),
    (["--model.lr=fast"], "model.lr"),
    (["--seed_everything=true"], "give a number"),
    (["--ckpt_path=/nowhere/last.ckpt"], "does not exist"),
    (["--resume=/nowhere"], "name the folder of a run"),
    (["--resume"], "expected one argument"),
    (["--model.image_size=big"], "--model.image_size takes int, 'native' or null, not big"),
    (["--data.val_fraction=10%"], "--data.val_fraction takes float, not 10%"),
    (
        ["--data=ShapesDataModule", "--data.leave_out=/nowhere.csv"],
        "--data.leave_out=/nowhere.csv cannot be read as a list of images (No such file or dir",
    ),
    (["photos.zip"], "photos.zip is no option: options begin with two dashes"),
    (["/"], "for images of your own in that folder, give --data=ImageFolderDataModule --data.root"),
    (["--config=/nowhere.yaml"], "/nowhere.yaml"),
    (["--trainer.strategy=fsdp"], "fsdp"),
    (["--trainer.limit_val_batches=0"], "need validation images"),
    (["--trainer.barebones=true"], "barebones=true leaves out the log"),
    (["--data.augment.hue=2"], "hue"),
    (["--data.augment=false"], "the presets of augmentation are cifar, photos, none"),
    (["--data.augment=foto"], "the presets of augmentation are cifar, photos, none"),
    (["--data.augment.crop_scale=[0,1]"], "two shares of the image's area, such as [0.35, 1]"),
]


@pytest.mark.parametrize(("options", "message"), MISTAKES, ids=lambda value: str(value)[:40])
def test_mistakes_get_a_sentence(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["fit"])
    with pytest.raises(SystemExit, match=r"^2$"), one_sentence():
        fit([*TINY, *options])
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]


@pytest.mark.slow
def test_a_preset_of_augmentation_and_an_option_that_overrides_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["fit"])
    images = ["--data.train_images=40", "--data.test_images=20", "--trainer.max_epochs=1"]
    fit([*TINY, *images, "--data.augment", "photos", "--data.augment.erase=0.2"])
    written = yaml.safe_load(Path(RUN, "config.yaml").read_text())["data"]["init_args"]["augment"]
    assert written == asdict(Augment(preset="photos", erase=0.2))
    fit([f"--resume={RUN}", "--trainer.max_epochs=2"])
    with pytest.raises(UserError, match=r"data\.augment\.erase=null differs from 0\.2"):
        fit([f"--resume={RUN}", "--trainer.max_epochs=3", "--data.augment=none"])


OWN = """
from lightning import Trainer
from lightning.pytorch import Callback
from cifar_transfer import ShapesDataModule

class Mine(Callback):
    def __init__(self, fault):
        self.fault = fault
        if fault == "constructor":
            raise ValueError("of mine")

    def on_train_start(self, trainer, pl_module):
        if self.fault == "hook":
            raise ValueError("of mine")
        if self.fault == "disk":
            raise PermissionError(13, "of mine")
        if self.fault == "Lightning's":
            pl_module.log("figure", "of mine")
        if self.fault == "options":
            Trainer(strategy="of mine")

class NoConstructor(ShapesDataModule):
    def __init__(self, **options):
        raise TypeError("of mine")

class NoImages(ShapesDataModule):
    def load(self, split):
        raise OSError(28, "of mine")
"""
FAULTS = ("constructor", "hook", "disk", "Lightning's", "options")
OWN_FAULTS = {
    fault: [
        "--data=ShapesDataModule",
        "--trainer.callbacks=own_code.Mine",
        f"--trainer.callbacks.fault={fault}",
    ]
    for fault in FAULTS
}
OWN_FAULTS["data's constructor"] = ["--data=own_code.NoConstructor"]
OWN_FAULTS["data's load"] = ["--data=own_code.NoImages"]
OWN_FAULTS["import"] = ["--data=own_import.Data"]


@pytest.mark.parametrize("options", OWN_FAULTS.values(), ids=OWN_FAULTS)
def test_what_code_of_the_users_own_raises_keeps_its_traceback(tmp_path, monkeypatch, options):
    """Whoever called it, and whatever it is: who wrote it needs the line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_code.py").write_text(OWN)
    (tmp_path / "own_import.py").write_text("raise RuntimeError('of mine')\n")
    small = ["--model.backbone=lenet5", "--model.weights=none", "--trainer.accelerator=cpu"]
    with (
        pytest.raises((ValueError, TypeError, OSError, RuntimeError), match="of mine") as raised,
        one_sentence(),
    ):
        fit([*options, *small, "--report.figures=false", "--trainer.max_epochs=1"])
    files = {Path(entry.path).name for entry in raised.traceback}
    assert files & {"own_code.py", "own_import.py"}


def test_with_debug_the_traceback_comes_before_the_sentence(tmp_path):
    mistake = [*TINY, "--model.lr=-1"]
    done = run_fit(tmp_path, *mistake, "--debug", expect=2)
    assert "Traceback (most recent call last)" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: lr is -1.0: take a positive rate")
    assert "Traceback" not in run_fit(tmp_path, *mistake, expect=2).stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: resnet50\n", r"--model is a group .*did you mean --model\.backbone=resnet50\?"),
        ("trainer: gpu\n", r"did you mean --trainer\.accelerator=gpu\?"),
        ("data: photos\n", r"--data=photos names no data module"),
        ("", r"mine\.yaml has no options: give them as YAML"),
        ("- model\n- lr\n", r"mine\.yaml has no options: give them as YAML"),
        ("some words\n", r"mine\.yaml has no options: give them as YAML"),
    ],
)
def test_a_slip_in_a_file_of_options_gets_a_sentence(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        fit(["--config=mine.yaml"])


def test_the_folder_of_a_run_as_a_checkpoint_is_answered_with_its_best(job):
    with pytest.raises(UserError, match=rf"is the folder of a run: name .*{RUN}/checkpoints/best"):
        evaluate(str(job[0] / RUN))


def test_a_list_to_leave_out_is_read_before_the_images_are_scored(job, monkeypatch):
    monkeypatch.setattr("cifar_transfer.commands.evaluate.evaluate_checkpoint", pytest.fail)
    with pytest.raises(UserError, match=r"leave_out=nowhere\.csv cannot be read"):
        evaluate(str(job[0] / RUN / "checkpoints/best.ckpt"), leave_out="nowhere.csv")


def test_a_network_too_deep_for_the_images_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=r"alexnet cannot take images of 32 x 32 pixels.*image_size"
    ):
        fit([*TINY, "--model.backbone=alexnet"])


def test_a_mistake_ends_with_status_two_and_no_traceback(tmp_path):
    done = run_fit(tmp_path, "--model.backbone=resnet81", "--model.weights=none", expect=2)
    assert done.stderr.splitlines()[-1].startswith("error: There is no backbone 'resnet81'")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "lightning_logs").exists()


def test_checkpoints_that_are_none_are_explained(tmp_path):
    (tmp_path / "w.ckpt").write_bytes(b"no checkpoint")
    for path, message in (
        ("gone.ckpt", "does not exist"),
        ("w.ckpt", "cannot be read as a checkpoint"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate(str(tmp_path / path))


@pytest.mark.parametrize("bar", ["TQDMProgressBar", "RichProgressBar"])
def test_the_users_own_progress_bar_replaces_ours_and_limit_test_batches_0_skips_the_test(
    tmp_path, monkeypatch, bar
):
    if bar == "RichProgressBar":
        pytest.importorskip("rich", reason="rich is an optional package of Lightning's")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    options = [
        f"--trainer.callbacks+={bar}",
        "--trainer.limit_test_batches=0",
        "--trainer.max_epochs=1",
    ]
    seen = []
    monkeypatch.setattr(
        Report, "on_train_start", lambda report, trainer, module: seen.extend(trainer.callbacks)
    )
    assert fit([*TINY, *options]).scores.keys() == {"best/val_acc"}
    assert [type(callback).__name__ for callback in seen if isinstance(callback, ProgressBar)] == [
        bar
    ]


def test_the_runs_of_the_demo_lie_where_no_other_command_takes_them(tmp_path, monkeypatch, capsys):
    """`predict` would otherwise take the network from scratch, being the newest."""
    monkeypatch.chdir(tmp_path)
    commands = []

    def run_fit(options):
        name = options[1].removeprefix("--run=")
        run = tmp_path / "lightning_logs" / name
        (run / "checkpoints").mkdir(parents=True)
        (run / "checkpoints/best.ckpt").touch()
        (run / "result.json").write_text('{"best/test_acc": 0.5}')
        commands.append(options)
        return 0

    monkeypatch.setattr(demo, "run_fit", run_fit)
    demo.main(["--seed_everything=1"])
    demo.main([])
    assert [options[:2] for options in commands[:3]] == [
        [f"--config=demo-{name}", f"--run=demo/version_0/{name}"]
        for name in ("upstream", "transfer", "scratch")
    ]
    assert (
        "--model.weights=lightning_logs/demo/version_0/upstream/checkpoints/best.ckpt"
        in (commands[1])
    )
    assert commands[3][1] == "--run=demo/version_1/upstream"
    assert "50.0%  from scratch" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"No run in .* has a checkpoint"):
        newest_checkpoint()


def test_a_demo_without_results_is_refused_before_training(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    with pytest.raises(UserError, match="fast_dev_run keeps none"):
        demo.main(["--trainer.fast_dev_run=true"])
