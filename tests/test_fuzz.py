"""Configurations of `fit`, drawn at random: each trains with what was given, or is refused in a sentence."""

import io
import math
import operator
import signal
import warnings
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import pytest
import yaml
from conftest import write_images
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from cifar_transfer.base.errors import one_sentence
from cifar_transfer.cli.fit_cli import FitCLI
from cifar_transfer.commands.fit import fit
from cifar_transfer.data.cifar import CLASSES
from cifar_transfer.training.classifier import TransferClassifier
from cifar_transfer.training.freeze import BackboneFreeze
from cifar_transfer.training.report import Report

BASE = [
    "--trainer.accelerator=cpu",
    "--report.figures=false",
    "--model.weights=none",
    "--trainer.logger=false",
]
BASE += ["--trainer.enable_checkpointing=false"]
NETWORKS = ("lenet5", "shufflenet_v2_x0_5")
# Values that each option takes, and beside which others are combined.
OPTIONS = {
    "seed_everything": ("0", "1", "4294967295"),
    "model.backbone": NETWORKS,
    "model.weights": ("none",),
    "model.num_classes": ("10", "null"),
    "model.image_size": ("32", "64", "null"),
    "model.train_sizes": ("[32]", "[32, 64]", "null"),
    "model.normalize": ("cifar10", "imagenet", "[[0.5, 0.5, 0.5], [0.2, 0.2, 0.2]]"),
    "model.small_images": ("true", "false"),
    "model.patch_size": ("null",),
    "model.label_smoothing": ("0", "0.1", "0.99"),
    "model.optimizer": ("adam", "adamw", "sgd"),
    "model.lr": ("1e-3", "1", "1e-30"),
    "model.head_lr": ("1e-3", "null"),
    "model.layer_decay": ("0.75", "1", "null"),
    "model.weight_decay": ("0", "1e-4"),
    "model.momentum": ("0", "0.9"),
    "model.schedule": ("plateau", "linear", "cosine"),
    "model.warmup_epochs": ("0", "0.5", "1"),
    "model.lr_factor": ("0.5", "0.1"),
    "model.lr_patience": ("0", "2"),
    "model.ema": ("0", "0.999", "null"),
    "model.compile": ("false",),
    "freeze.unfreeze_epoch": ("0", "1", "5", "1000000"),
    "freeze.unfrozen_lr": ("1e-4", "null"),
    "freeze.frozen": ("null", r'["classifier\\.network\\..*"]'),
    "freeze.batch_norm": ("eval", "train"),
    "freeze.phases": ("gradual", "null"),
    "freeze.monitor": ("val/loss",),
    "freeze.mode": ("min", "max"),
    "report.figures": ("false",),
    "data.batch_size": ("2", "16", "64"),
    "data.eval_batch_size": ("1", "256"),
    "data.val_fraction": ("0", "0.1", "0.5"),
    "data.class_weights": ("balanced", "null"),
    "data.sampler": ("balanced", "null"),
    "data.num_workers": ("0", "1", "null"),
    "data.augment.padding": ("0", "4"),
    "data.augment.flip": ("0", "0.5", "1"),
    "data.augment.brightness": ("0", "0.2", "5"),
    "data.augment.contrast": ("0", "0.2"),
    "data.augment.saturation": ("0", "0.2"),
    "data.augment.hue": ("0", "0.1", "0.5"),
    "data.augment.degrees": ("0", "15", "720"),
    "data.augment.padding_mode": ("constant", "reflect"),
    "trainer.strategy": ("auto",),
    "trainer.devices": ("1", "auto"),
    "trainer.num_nodes": ("1",),
    "trainer.precision": ("32-true", "32", "bf16-mixed"),
    "trainer.fast_dev_run": ("false", "true", "1"),
    "trainer.max_epochs": ("1", "3", "40"),
    "trainer.min_epochs": ("1", "null"),
    "trainer.max_steps": ("-1", "5"),
    "trainer.max_time": ("00:01:00:00", "null"),
    "trainer.limit_train_batches": ("1.0", "2", "0.5"),
    "trainer.limit_val_batches": ("1.0", "2"),
    "trainer.limit_test_batches": ("0", "1.0"),
    "trainer.overfit_batches": ("0.0", "1"),
    "trainer.val_check_interval": ("1.0", "2"),
    "trainer.check_val_every_n_epoch": ("1", "2"),
    "trainer.num_sanity_val_steps": ("0", "1"),
    "trainer.log_every_n_steps": ("1", "7"),  # the default, 10, is less in a short run
    "trainer.accumulate_grad_batches": ("1", "2"),
    "trainer.gradient_clip_val": ("1.0", "null"),
    "trainer.gradient_clip_algorithm": ("norm", "value"),
    "trainer.deterministic": ("true", "false", "warn"),
    "trainer.benchmark": ("true", "false"),
    "trainer.profiler": ("null",),
    "trainer.default_root_dir": ("runs", "null"),
}
OWN = {  # of each data module
    "ShapesDataModule": {
        "data.task": ("upstream", "downstream"),
        "data.train_images": ("40", "50"),
        "data.test_images": ("10", "20"),
    },
    "ImageFolderDataModule": {
        "data.root": ("photos",),
        "data.decode_size": ("32", "null"),
        "data.cache_limit_gb": ("0", "8.0", ".inf"),
        "data.max_megapixels": ("1", "100.0"),
    },
    "CIFAR10DataModule": {"data.root": ("cifar",), "data.url": ("null", "http://127.0.0.1:9/x")},
}
NASTY = (
    *(
        "",
        " ",
        "nan",
        ".nan",
        "inf",
        ".inf",
        "-.inf",
        "-1",
        "-0.5",
        "-0.0",
        "0",
        "0.3",
        "1",
        "1.0",
        "1.5",
        "2",
        "17",
    ),
    *(
        "1e9",
        "1e400",
        "1e-400",
        "1000000000",
        "9007199254740993",
        "18446744073709551616",
        "-9223372036854775809",
    ),
    *(
        "100000",
        "4001",
        "65537",
        "true",
        "false",
        "yes",
        "null",
        "None",
        "none",
        "foo",
        "auto",
        "native",
        "weights",
        "*",
    ),
    *(
        "[]",
        "[1]",
        "[1, 2]",
        "[-1]",
        "[0, 32]",
        "[nan]",
        "['a']",
        "[[]]",
        "[null]",
        "{}",
        "{a: 1}",
        "{class_path: foo}",
    ),
    *(
        "[[0.5, 0.5, 0.5], [0, 1, 1]]",
        "[[nan, 0, 0], [1, 1, 1]]",
        "[[0, 0, 0], [nan, 1, 1]]",
        "[[a, b, c], [1, 1, 1]]",
    ),
    *(
        "os.system",
        "../..",
        "/dev/null",
        "/dev/null/nowhere",
        "a\nb",
        "é",
        "猫",
        "%s",
        "'",
        '"',
        "[",
        "{",
        ": :",
        "!!python/object",
        "&a",
    ),
    *(
        '["("]',
        '["^nothing$"]',
        '["network"]',
        "0x10",
        "1_000",
        "010",
        "1:30",
        "2020-01-01",
        "+5",
        "٣",
        "1,5",
        "1e-3 ",
    ),
)
TEXTS = st.one_of(
    st.sampled_from(NASTY),
    st.integers(-(2**70), 2**70).map(str),
    st.integers(-3, 40).map(str),
    st.floats().map(repr),
    st.floats(-1, 2).map(repr),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8),
)
KINDS = tuple(OWN)


@st.composite
def configurations(draw):
    """A data module, and options of which some have values that may be anything."""
    kind = draw(st.sampled_from((*KINDS, "ShapesDataModule", "ShapesDataModule")))
    known = OPTIONS | OWN[kind]
    names = draw(st.lists(st.sampled_from(sorted(known)), min_size=1, max_size=5, unique=True))
    wild = draw(st.sampled_from((1, 1, 1, 0, 2)))
    values = {
        name: draw(TEXTS if at < wild else st.sampled_from(known[name]))
        for at, name in enumerate(names)
    }
    return kind, values


TRAINER = ("max_epochs", "limit_train_batches", "limit_val_batches", "num_sanity_val_steps")
TRAINER += (
    "log_every_n_steps",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "check_val_every_n_epoch",
)


class Started(Exception):
    """Training would begin now."""


@contextmanager
def seconds(limit):
    def late(*_):
        raise TimeoutError(f"no answer after {limit} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(limit)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def attempt(kind, values):
    """What comes of a configuration.

    Returns:
        The command line's objects if training would begin, or else what is printed on stderr.
    """
    first = [f"--data={kind}"] + [
        f"--{name}={OWN[kind][name][0]}" for name in OWN[kind] if name not in values
    ]
    first += [] if "model.backbone" in values else ["--model.backbone=lenet5"]
    said, cli, status = io.StringIO(), None, None
    with (
        redirect_stderr(said),
        redirect_stdout(io.StringIO()),
        warnings.catch_warnings(),
        seconds(60),
    ):
        warnings.simplefilter("ignore")
        try:
            with one_sentence():
                cli = FitCLI(
                    [*BASE, *first, *(f"--{name}={value}" for name, value in values.items())]
                )
                cli.trainer.fit(cli.model, cli.datamodule)
        except Started:
            pass
        except SystemExit as end:
            status = end.code
    assert status in (None, 2)
    return said.getvalue() if status else cli


def kept(cli, name):
    """What became of an option; KeyError where no object says so."""
    where, _, rest = name.partition(".")
    if where == "data":
        return operator.attrgetter(rest)(cli.datamodule)
    if where == "model":
        return cli.model.hparams[rest]
    if where == "seed_everything":
        return cli.datamodule.seed
    if where in ("freeze", "report"):
        kind = {"freeze": BackboneFreeze, "report": Report}[where]
        return getattr(
            next(callback for callback in cli.trainer.callbacks if isinstance(callback, kind)), rest
        )
    if rest in TRAINER and not cli.trainer.fast_dev_run:
        return getattr(cli.trainer, rest)
    raise KeyError(name)


def means(text, value):
    """Whether a text is a way to write a value."""
    with suppress(yaml.YAMLError, ValueError):
        read = yaml.safe_load(text)
        if read == value and isinstance(read, bool) == isinstance(value, bool):
            return True
    if value is None:
        return text.strip() in ("None", "none")
    if isinstance(value, bool):
        return False
    if isinstance(value, int | float):
        with suppress(ValueError):
            return value == float(
                text.strip(" '").replace(".inf", "inf")
            )  # also 1e-3, which is text to YAML
        return False
    return str(value) in (text, text.strip(" ")) or (
        isinstance(value, Path) and value == Path(text)
    )


def too_large(values):
    """Valid, but it would take more memory or processes than a test should."""

    def number(name):
        try:
            return float(yaml.safe_load(values.get(name, "null")))  # to which 1:30 is 90
        except (ValueError, TypeError, yaml.YAMLError):
            return math.nan

    sizes = {
        "model.image_size": (100, 4000),
        "data.decode_size": (100, 4000),
        "data.train_images": (3000, 10**6),
    }
    sizes |= {
        "data.test_images": (3000, 10**6),
        "trainer.devices": (2, math.inf),
        "trainer.num_nodes": (2, math.inf),
    }
    sizes |= {"data.num_workers": (3, 512)}
    return any(low <= number(name) <= high for name, (low, high) in sizes.items())


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with images, in which training stops before its first step."""
    folder = tmp_path_factory.mktemp("fuzz")
    write_images(folder / "photos" / "train", 12)
    write_images(folder / "photos" / "test", 3, seed=1)
    for split, count in (("train", 3), ("test", 1)):
        write_images(folder / "cifar" / split, count, classes=CLASSES, seed=count)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("sys.argv", ["fit"])
        patch.setattr(TransferClassifier, "on_train_start", start)
        yield folder


def start(model):
    raise Started


# What null leaves to the data, the weights or Lightning.
CHOSEN = (
    "model.num_classes",
    "model.normalize",
    "trainer.num_sanity_val_steps",
    "trainer.log_every_n_steps",
)
# Lightning's word for all; and ten, which is the default, is less in a short run.
OTHERWISE = {("trainer.num_sanity_val_steps", "-1"), ("trainer.log_every_n_steps", "010")}


def trains_as_given_or_says_why_not(kind, values):
    outcome = attempt(kind, values)
    if isinstance(outcome, str):
        errors = [line for line in outcome.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, outcome
        assert len(errors[0]) < 500
        assert "Traceback" not in outcome
        return
    for name, text in values.items():
        if name in CHOSEN or name.startswith("trainer.limit_"):
            with suppress(yaml.YAMLError):
                if yaml.safe_load(text) is None:
                    continue  # as the data or the weights have it, or all batches
        if (name, text) in OTHERWISE:
            continue
        with suppress(KeyError):
            assert means(text, kept(outcome, name)), (name, text, kept(outcome, name))


SETTINGS = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[*HealthCheck],
    print_blob=False,
)


@settings(SETTINGS, max_examples=40)
@given(configurations().filter(lambda drawn: not too_large(drawn[1])))
def test_a_sample_of_configurations(place, drawn):
    trains_as_given_or_says_why_not(*drawn)


# What ends a run earlier, or takes longer than a test should.
SHORT = (
    "trainer.fast_dev_run",
    "trainer.max_epochs",
    "trainer.default_root_dir",
    "model.warmup_epochs",
)
KNOWN = {
    name: texts for name, texts in (OPTIONS | OWN["ShapesDataModule"]).items() if name not in SHORT
}
TRAIN_START = TransferClassifier.on_train_start


@st.composite
def many_options(draw):
    """Of most options a value that it takes."""
    names = draw(st.lists(st.sampled_from(sorted(KNOWN)), min_size=15, max_size=40, unique=True))
    return {name: draw(st.sampled_from(KNOWN[name])) for name in names}


@settings(
    SETTINGS, max_examples=12, phases=[Phase.generate]
)  # to look for a smaller failure takes minutes
@given(values=many_options())
def test_a_sample_trains_an_epoch_and_is_tested(place, values):
    """With checkpoints and a logger, to the end of the command."""
    values = {
        "model.backbone": "lenet5",
        "data.train_images": "40",
        "data.test_images": "10",
    } | values
    args = [
        *BASE[:3],
        "--data=ShapesDataModule",
        "--trainer.max_epochs=1",
        "--trainer.default_root_dir=runs",
    ]
    said, outcome, status = io.StringIO(), None, 0
    with (
        pytest.MonkeyPatch.context() as patch,
        redirect_stderr(said),
        redirect_stdout(io.StringIO()),
        seconds(60),
    ):
        patch.setattr(TransferClassifier, "on_train_start", TRAIN_START)
        warnings.simplefilter("ignore")
        try:
            with one_sentence():
                outcome = fit([*args, *(f"--{name}={value}" for name, value in values.items())])
        except SystemExit as end:
            status = end.code
    assert status == (0 if outcome else 2)
    if outcome is None:
        errors = [line for line in said.getvalue().splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, said.getvalue()
        return
    tested = values.get("trainer.limit_test_batches") != "0"
    assert outcome.scores.keys() == {"best/val_acc", *(["best/test_acc"] if tested else [])}
    assert all(0 <= score <= 1 for score in outcome.scores.values())
    assert outcome.best.is_file()


@pytest.mark.whole
@settings(SETTINGS, max_examples=4000)
@given(configurations().filter(lambda drawn: not too_large(drawn[1])))
def test_thousands_of_configurations(place, drawn):
    trains_as_given_or_says_why_not(*drawn)


@pytest.mark.whole
def test_every_option_with_every_nasty_value(place):
    for kind, own in OWN.items():
        for name in own if kind != "ShapesDataModule" else OPTIONS | own:
            for value in NASTY:
                if not too_large({name: value}):
                    trains_as_given_or_says_why_not(kind, {name: value})


REFUSED = [
    ("model.lr", "nan"),
    ("model.lr", "-1"),
    ("model.lr", "inf"),
    ("model.schedule", "foo"),
    ("model.image_size", "100000"),
    ("model.num_classes", "0"),
    ("model.weight_decay", "nan"),
    ("model.lr_factor", "nan"),
    ("model.normalize", "[[.nan, 0, 0], [1, 1, 1]]"),
    ("data.batch_size", "1e9"),
    ("data.batch_size", "1000000000"),
    ("data.class_weights", "[1, 2]"),
    ("data.class_weights", "[.nan, 1]"),
    ("data.class_weights", "[]"),
    ("data.class_weights", "foo"),
    ("data.sampler", "foo"),
    ("data.train_images", "null"),
    ("data.train_images", "1000000000000"),
    ("data.augment.degrees", "nan"),
    ("data.augment.padding", "1000000000"),
    ("data.augment.padding_mode", "foo"),
    ("freeze.unfreeze_epoch", "-3"),
    ("freeze.unfrozen_lr", "inf"),
    ("freeze.frozen", '["("]'),
    ("freeze.frozen", "[]"),
    ("report.figures", "7"),
    ("seed_everything", "-1"),
    ("seed_everything", "1099511627776"),
    ("trainer.max_epochs", "abc"),
    ("trainer.max_epochs", "null"),
    ("trainer.accumulate_grad_batches", "-2"),
    ("trainer.gradient_clip_val", ".nan"),
    ("trainer.precision", "17"),
    ("trainer.devices", "-7"),
    ("trainer.devices", "true"),
    ("trainer.val_check_interval", "1000"),
    ("trainer.check_val_every_n_epoch", "0"),
    ("model.num_classes", "1000000000"),
    ("trainer.default_root_dir", "/dev/null"),
]


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_what_makes_no_sense_is_refused_before_training(place, name, value):
    said = attempt("ShapesDataModule", {name: value})
    assert isinstance(said, str), "it trains"
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert len(errors[0]) < 400
    assert name.split(".")[-1] in errors[0]
