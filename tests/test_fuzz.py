"""Random configurations of `fit`: each trains with its options, or is refused in a sentence."""

import io
import math
import operator
import signal
import warnings
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from conftest import write_images
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from cifar_transfer.base.errors import one_sentence
from cifar_transfer.cli.fit_cli import FitCLI
from cifar_transfer.commands.fit import fit
from cifar_transfer.data.cifar import CLASSES
from cifar_transfer.data.table import TableDataModule
from cifar_transfer.training.classifier import TransferClassifier
from cifar_transfer.training.freeze import BackboneFreeze
from cifar_transfer.training.report import Report

TINY = ["--trainer.accelerator=cpu", "--report.figures=false", "--model.weights=none"]
KEEP_NOTHING = ["--trainer.logger=false", "--trainer.enable_checkpointing=false"]
NETWORKS = ("lenet5", "shufflenet_v2_x0_5")
# Values that each option takes, and beside which others are combined.
OPTIONS: dict[str, tuple[str, ...]] = {
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
    "model.mixup_alpha": ("0", "0.2", "1000"),
    "model.cutmix_alpha": ("0", "1"),
    "model.mix_off_epochs": ("0", "1", "100"),
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
    "freeze.batch_norm": ("eval", "train", "fixed"),
    "freeze.phases": ("gradual", "null"),
    "freeze.monitor": ("val/loss",),
    "freeze.mode": ("min", "max"),
    "report.figures": ("false",),
    "report.best": ("val/acc", "val/loss", "val/macro_f1"),
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
    "data.augment.crop_scale": ("null", "[0.35, 1.0]"),
    "data.augment.translate": ("0", "0.1"),
    "data.augment.erase": ("0", "0.5"),
    "data.augment.interpolation": ("nearest", "bilinear"),
    "data.augment.preset": ("cifar", "photos", "none", "null"),
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
OPTIONS_OF_DATA: dict[str, dict[str, tuple[str, ...]]] = {
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
        "data.skip_broken": ("true", "false"),
        "data.group": ("null", r"(\d+)\.png", "("),
        "data.test_fraction": ("null", "0", "0.3"),
    },
    "TableDataModule": {
        "data.train": ("photos.csv",),
        "data.val": ("photos.csv", "null"),
        "data.test": ("photos.csv", "null"),
        "data.tables": (".",),
        "data.image_column": ("image",),
        "data.label_column": ("label",),
        "data.group_column": ("null", "image"),
    },
    "CIFAR10DataModule": {"data.root": ("cifar",), "data.url": ("null", "http://127.0.0.1:9/x")},
}
# Texts that are numbers to some, and at the edges of what an option takes.
NUMBERS = (
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
    "4001",
    "65537",
    "100000",
    "1000000000",
    "1e9",
    "1e400",
    "1e-400",
    "9007199254740993",
    "18446744073709551616",
    "-9223372036854775809",
    "0x10",
    "1_000",
    "010",
    "1:30",
    "2020-01-01",
    "+5",
    "٣",
    "1,5",
    "1e-3 ",
)
WORDS = (
    "",
    " ",
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
)
COLLECTIONS = (
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
    "[[0.5, 0.5, 0.5], [0, 1, 1]]",
    "[[nan, 0, 0], [1, 1, 1]]",
    "[[0, 0, 0], [nan, 1, 1]]",
    "[[a, b, c], [1, 1, 1]]",
    '["("]',
    '["^nothing$"]',
    '["network"]',
)
NASTY = (*NUMBERS, *WORDS, *COLLECTIONS)
ANY_TEXT = st.one_of(
    st.sampled_from(NASTY),
    st.integers(-(2**70), 2**70).map(str),
    st.integers(-3, 40).map(str),
    st.floats().map(repr),
    st.floats(-1, 2).map(repr),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8),
)
# Values from which to which an option is valid, but takes more than a test should: memory, or
# processes.
TOO_LARGE = {
    "model.image_size": (100, 4000),
    "data.decode_size": (100, 4000),
    "data.train_images": (3000, 10**6),
    "data.test_images": (3000, 10**6),
    "data.num_workers": (3, 512),
    "trainer.devices": (2, math.inf),
    "trainer.num_nodes": (2, math.inf),
}


class Configuration(NamedTuple):
    """The name of a data module, and texts of options by their names."""

    data: str
    options: dict[str, str]

    def arguments(self):
        """Return a command line, with what the data module needs."""
        arguments = [f"--data={self.data}"]
        if "model.backbone" not in self.options:
            arguments.append("--model.backbone=lenet5")
        for name, values in OPTIONS_OF_DATA[self.data].items():
            if name not in self.options:
                arguments.append(f"--{name}={values[0]}")
        for name, value in self.options.items():
            arguments.append(f"--{name}={value}")
        return arguments

    def is_too_large(self):
        for name, (low, high) in TOO_LARGE.items():
            if low <= as_number(self.options.get(name, "null")) <= high:
                return True
        return False


def as_number(text):
    """Return the number that YAML reads, to which 1:30 is 90; NaN if it is none."""
    try:
        return float(yaml.safe_load(text))
    except (ValueError, TypeError, yaml.YAMLError):
        return math.nan


@st.composite
def configurations(draw):
    """A few options, of which none, one or two have values that may be anything."""
    data = draw(st.sampled_from((*OPTIONS_OF_DATA, "ShapesDataModule", "ShapesDataModule")))
    values = OPTIONS | OPTIONS_OF_DATA[data]
    names = draw(st.lists(st.sampled_from(sorted(values)), min_size=1, max_size=5, unique=True))
    nasty = draw(st.sampled_from((1, 1, 1, 0, 2)))
    options = {}
    for number, name in enumerate(names):
        texts = ANY_TEXT if number < nasty else st.sampled_from(values[name])
        options[name] = draw(texts)
    return Configuration(data, options)


CONFIGURATIONS = configurations().filter(lambda configuration: not configuration.is_too_large())


class Started(Exception):
    """Training would begin now."""


@contextmanager
def time_limit(seconds):
    def fail(*_):
        raise TimeoutError(f"no answer after {seconds} s")

    handler = signal.signal(signal.SIGALRM, fail)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)


class Outcome(NamedTuple):
    """The value that a command returned, or the lines on stderr if it was refused."""

    value: object
    errors: list[str]


def run(command):
    """Call a function as a command. It must end well or be refused, within a minute."""
    printed = io.StringIO()
    with (
        redirect_stderr(printed),
        redirect_stdout(io.StringIO()),
        warnings.catch_warnings(),
        time_limit(60),
    ):
        warnings.simplefilter("ignore")
        try:
            with one_sentence():
                return Outcome(command(), [])
        except SystemExit as end:
            status = end.code
    assert status == 2
    return Outcome(None, printed.getvalue().splitlines())


def start_training(configuration):
    """Return the objects of the command line if training would begin, or else errors."""

    def command():
        cli = FitCLI([*TINY, *KEEP_NOTHING, *configuration.arguments()])
        with suppress(Started):
            cli.trainer.fit(cli.model, cli.datamodule)
        return cli

    return run(command)


def assert_one_sentence(lines, max_chars):
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1, lines
    assert len(errors[0]) < max_chars
    assert not any("Traceback" in line for line in lines)
    return errors[0]


# Options of the Trainer that are attributes of it, too.
TRAINER_ATTRIBUTES = (
    "max_epochs",
    "limit_train_batches",
    "limit_val_batches",
    "num_sanity_val_steps",
    "log_every_n_steps",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "check_val_every_n_epoch",
)


def value_of(cli, name):
    """Return what became of an option.

    Raises:
        LookupError: No object says so.
    """
    group, _, name_in_group = name.partition(".")
    if group == "data" and isinstance(cli.datamodule, TableDataModule):
        return cli.datamodule.hparams[name_in_group]
    if group == "data":
        return operator.attrgetter(name_in_group)(cli.datamodule)
    if group == "model":
        return cli.model.hparams[name_in_group]
    if group == "seed_everything":
        return cli.datamodule.seed
    if group in ("freeze", "report"):
        kind = BackboneFreeze if group == "freeze" else Report
        for callback in cli.trainer.callbacks:
            if isinstance(callback, kind):
                return getattr(callback, name_in_group)
    if name_in_group in TRAINER_ATTRIBUTES and not cli.trainer.fast_dev_run:
        return getattr(cli.trainer, name_in_group)
    raise LookupError(name)


def means(text, value):
    """Return whether a text is a way to write a value."""
    with suppress(yaml.YAMLError, ValueError):
        loaded = yaml.safe_load(text)
        if loaded == value and isinstance(loaded, bool) == isinstance(value, bool):
            return True
    if value is None:
        return text.strip() in ("None", "none")
    if isinstance(value, bool):
        return False
    if isinstance(value, int | float):
        # 1e-3 is text to YAML.
        with suppress(ValueError):
            return value == float(text.strip(" '").replace(".inf", "inf"))
        return False
    if isinstance(value, Path):
        return value == Path(text)
    return str(value) in (text, text.strip(" "))


# What null leaves to the data, the weights or Lightning.
CHOSEN_FOR_NULL = (
    "model.num_classes",
    "model.normalize",
    "trainer.num_sanity_val_steps",
    "trainer.log_every_n_steps",
)
# Values that become others: Lightning's word for all; and ten, the default, is less in a short run.
REPLACED = {("trainer.num_sanity_val_steps", "-1"), ("trainer.log_every_n_steps", "010")}


def may_become_another_value(name, text):
    if (name, text) in REPLACED:
        return True
    if name in CHOSEN_FOR_NULL or name.startswith("trainer.limit_"):
        with suppress(yaml.YAMLError):
            return yaml.safe_load(text) is None
    return False


def assert_trains_as_told_or_is_refused(configuration):
    outcome = start_training(configuration)
    if outcome.errors:
        assert_one_sentence(outcome.errors, max_chars=500)
        return
    for name, text in configuration.options.items():
        if may_become_another_value(name, text):
            continue
        if name.startswith("trainer.limit_") and "trainer.overfit_batches" in configuration.options:
            continue  # Lightning puts the one in place of the other
        with suppress(LookupError):
            value = value_of(outcome.value, name)
            assert means(text, value), (name, text, value)


def stop_training(module):
    raise Started


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with images, in which training stops before its first step."""
    folder = tmp_path_factory.mktemp("fuzz")
    write_images(folder / "photos" / "train", 12)
    write_images(folder / "photos" / "test", 3, seed=1)
    rows = [f"{path},{path.parent.name}" for path in (folder / "photos" / "train").glob("*/*")]
    (folder / "photos.csv").write_text("\n".join(["image,label", *rows]))
    write_images(folder / "cifar" / "train", 3, classes=CLASSES, seed=3)
    write_images(folder / "cifar" / "test", 1, classes=CLASSES, seed=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("sys.argv", ["fit"])
        patch.setattr(TransferClassifier, "on_train_start", stop_training)
        yield folder


SETTINGS = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[*HealthCheck],
    print_blob=False,
)


@pytest.mark.slow
@settings(SETTINGS, max_examples=40)
@given(CONFIGURATIONS)
def test_a_sample_of_configurations(place, configuration):
    assert_trains_as_told_or_is_refused(configuration)


# What ends a run earlier, or takes longer than a test should.
NOT_TO_THE_END = (
    "trainer.fast_dev_run",
    "trainer.max_epochs",
    "trainer.default_root_dir",
    "model.warmup_epochs",
)
TO_THE_END = OPTIONS | OPTIONS_OF_DATA["ShapesDataModule"]
for option in NOT_TO_THE_END:
    del TO_THE_END[option]
TRAIN_START = TransferClassifier.on_train_start


@st.composite
def many_options(draw):
    """Values of many options, each one that the option takes."""
    names = st.lists(st.sampled_from(sorted(TO_THE_END)), min_size=15, max_size=40, unique=True)
    options = {}
    for name in draw(names):
        options[name] = draw(st.sampled_from(TO_THE_END[name]))
    return options


@pytest.mark.slow
# To look for a smaller failure would take minutes.
@settings(SETTINGS, max_examples=12, phases=[Phase.generate])
@given(options=many_options())
def test_a_sample_trains_an_epoch_and_is_tested(place, options):
    """With checkpoints and a logger, to the end of the command."""
    configuration = Configuration("ShapesDataModule", options)
    end = ["--trainer.max_epochs=1", "--trainer.default_root_dir=runs"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TransferClassifier, "on_train_start", TRAIN_START)
        outcome = run(lambda: fit([*TINY, *end, *configuration.arguments()]))
    if outcome.errors:
        assert_one_sentence(outcome.errors, max_chars=500)
        return
    names = ["acc"]
    if options.get("report.best") == "val/macro_f1":
        names += ["balanced_accuracy", "macro_f1"]
    expected = {f"best/val_{name}" for name in names}
    if options.get("trainer.limit_test_batches") != "0":
        expected |= {f"best/test_{name}" for name in names}
    if options.get("report.best") == "val/loss":
        expected.add("best/val_loss")
    scores = outcome.value.scores
    assert scores.keys() == expected
    assert all(0 <= scores[name] <= 1 for name in expected - {"best/val_loss"})
    assert outcome.value.best.is_file()


@pytest.mark.whole
@settings(SETTINGS, max_examples=4000)
@given(CONFIGURATIONS)
def test_thousands_of_configurations(place, configuration):
    assert_trains_as_told_or_is_refused(configuration)


@pytest.mark.whole
def test_every_option_with_every_nasty_value(place):
    for data, options in OPTIONS_OF_DATA.items():
        if data == "ShapesDataModule":
            options = OPTIONS | options
        for name in options:
            for value in NASTY:
                configuration = Configuration(data, {name: value})
                if not configuration.is_too_large():
                    assert_trains_as_told_or_is_refused(configuration)


REFUSED = [
    ("model.lr", "nan"),
    ("model.lr", "-1"),
    ("model.lr", "inf"),
    ("model.schedule", "foo"),
    ("model.image_size", "100000"),
    ("model.num_classes", "0"),
    ("model.weight_decay", "nan"),
    ("model.mixup_alpha", "nan"),
    ("model.cutmix_alpha", "-1"),
    ("model.mix_off_epochs", "-1"),
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
    ("data.augment.crop_scale", "[1, 0]"),
    ("data.augment.crop_ratio", "[nan, 1]"),
    ("data.augment.interpolation", "foo"),
    ("freeze.unfreeze_epoch", "-3"),
    ("freeze.unfrozen_lr", "inf"),
    ("freeze.frozen", '["("]'),
    ("freeze.frozen", "[]"),
    ("report.figures", "7"),
    ("report.best", "val"),
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
    ("trainer.limit_train_batches", ".nan"),
    ("trainer.limit_val_batches", "-.inf"),
    ("trainer.limit_test_batches", ".nan"),
    ("trainer.overfit_batches", "-1"),
    ("model.num_classes", "1000000000"),
    ("trainer.default_root_dir", "/dev/null"),
]


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_what_makes_no_sense_is_refused_before_training(place, name, value):
    outcome = start_training(Configuration("ShapesDataModule", {name: value}))
    assert outcome.errors, "it trains"
    error = assert_one_sentence(outcome.errors, max_chars=400)
    assert name.split(".")[-1] in error
