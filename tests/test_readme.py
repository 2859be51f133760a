"""What README and docs say can be done, is done: each command, each option, each example."""

import re
import shlex
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import RUN, quiet_trainer, run_fit, write_images
from lightning import Trainer
from PIL import Image
from torch.distributed.run import get_args_parser
from torchvision.models import shufflenet_v2_x0_5

import cifar_transfer
from cifar_transfer.cli import start
from cifar_transfer.cli.fit_cli import FitCLI
from cifar_transfer.commands.export import export
from cifar_transfer.data.cifar import CLASSES

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = ROOT / "docs/options.md"
LOGGERS = ROOT / "docs/loggers.md"
DOCUMENTS = [ROOT / "README.md", ROOT / "README.zh-CN.md", *sorted(ROOT.glob("docs/*.md"))]
# Commands of others, word for word; what they need is not at hand, or takes too long.
FOREIGN = [
    "python3 -m venv .venv",
    "source .venv/bin/activate",
    "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK",
    "pip install .",
    "pip install torch torchvision --index-url https://download.pytorch.org/whl/cpu",
    "pip wheel --wheel-dir wheels .",
    "pip install --no-index --find-links wheels cifar-transfer",
    "tensorboard --logdir lightning_logs",
    "find holiday -name *.jpg",
]
# Commands of the README that no test can run, and why.
NOT_RUN = {
    "cifar-transfer demo": "a minute; it is run from the installed wheel",
    "cifar-transfer serve": "a server; it has tests of its own",
    "cifar-transfer fit --trainer.devices=4 --trainer.precision=bf16-mixed": "four GPUs",
}
SMALL = [
    *("--model.backbone=shufflenet_v2_x0_5", "--model.weights=none"),
    *("--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--report.figures=false"),
]


def blocks(path, *languages):
    found = re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text(), re.DOTALL | re.MULTILINE)
    return [(language, text) for language, text in found if not languages or language in languages]


def commands(path):
    """Yield the words of each command in a document, without comments; a pipe is two commands."""
    for _, text in blocks(path, "console", "bash"):
        for line in text.replace("\\\n", "").splitlines():
            words = shlex.split(line, comments=True)
            while "|" in words:
                yield words[: words.index("|")]
                words = words[words.index("|") + 1 :]
            if words:
                yield words


def ours(words):
    """The name of our command and its arguments, or None."""
    if words[0] == "cifar-transfer":
        return words[1], words[2:]
    if words[:2] == ["python", "-m"]:
        return words[2].removeprefix("cifar_transfer."), words[3:]
    return None


class Parsed(FitCLI):
    """What `fit` makes of its options, before anything is made of them."""

    def before_instantiate_classes(self):
        pass

    instantiate_classes = before_instantiate_classes


def check(words):
    if words[0] == "srun":
        return check(words[1:])
    if words[0] == "torchrun":
        launched = get_args_parser().parse_args(words[1:])
        return check(["python", "-m", launched.training_script, *launched.training_script_args])
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return None
    if (command := ours(words)) is None:
        assert shlex.join(words).replace("'", "") in FOREIGN
        return None
    name, arguments = command
    arguments = start.answer(name, arguments)
    return Parsed(arguments) if name == "fit" else None


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with all that the commands name: a run, images, a recipe, a module."""
    folder = tmp_path_factory.mktemp("place")
    (folder / RUN).mkdir(parents=True)
    (folder / RUN / "config.yaml").write_text(Parsed(["--model.backbone=resnet18"]).config_text)
    (folder / "my-recipe.yaml").write_text("trainer: {max_epochs: 3}\n")
    write_images(folder / "photos/train", 1)
    _, (_, own) = blocks(ROOT / "README.md", "python")
    (folder / "fruit.py").write_text(own.partition("class Mine")[0])
    return folder


@pytest.mark.parametrize(
    "command", sorted({shlex.join(words) for path in DOCUMENTS for words in commands(path)})
)
def test_a_command_is_one_with_such_options(command, place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(place)
    monkeypatch.setattr("sys.argv", ["fit"])
    check(shlex.split(command))


def test_every_option_exists():
    known = {option for command in start.COMMANDS for option in start.option_names(command)}
    known.add("--complete")  # of `cifar-transfer` itself
    for document in DOCUMENTS:
        text = re.sub(r"(?s)^```.*?^```$", "", document.read_text(), flags=re.MULTILINE)
        named = " ".join(re.findall(r"`([^`]+)`", text))
        assert {*re.findall(r"(--[a-z]\w*(?:\.[a-z]\w*)*)(?![\w.])", named)} <= known, document


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_extra_exists(document):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert {*re.findall(r"pip install '\.\[(\w+)\]'", document.read_text())} <= {*extras}


def test_every_link_leads_somewhere():
    for document in [*DOCUMENTS, ROOT / "benchmarks/README.md", ROOT / "SECURITY.md"]:
        text = document.read_text()
        for link in re.findall(r"\]\((?!https?:)([^)]*)\)|src=\"([^\"]*)\"", text):
            target, _, part = "".join(link).partition("#")
            path = document.parent / target if target else document
            assert path.exists(), f"{document.name}: {target}"
            if part:
                headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
                slugs = [
                    re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
                    for heading in headings
                ]
                assert part in slugs, f"{document.name}: {target}#{part}"


def test_every_file_of_the_package_has_its_place_in_the_table():
    named = re.findall(
        r"`(\w+\.py)`", (ROOT / "docs/house.md").read_text().partition("Beside the package")[0]
    )
    files = {path.name for path in (ROOT / "cifar_transfer").rglob("*.py")} - {"__init__.py"}
    assert {*named} == files


def test_both_languages_of_the_readme_say_the_same():
    english, chinese = DOCUMENTS[:2]
    assert len(english.read_text().splitlines()) <= 170

    def code(path):
        return [(language, re.sub(r" *# .*", "", text)) for language, text in blocks(path)]

    def facts(path):
        """The headings' levels, the measured figures, and where links lead to."""
        text = path.read_text().replace(".zh-CN", "")
        levels = [
            len(level)
            for level in re.findall(r"^(#+) ", re.sub(r"(?s)```.*?```", "", text), re.MULTILINE)
        ]
        return (
            levels,
            sorted(re.findall(r"\d+\.\d+|\d\d+", text)),
            sorted(re.findall(r"\]\((.*?)\)|src=(\S+)", text)),
        )

    assert code(english) == code(chinese)
    assert facts(english) == facts(chinese)


@pytest.mark.slow
def test_the_commands_of_the_readme_run_from_top_to_bottom(tmp_path, monkeypatch):
    """As a reader would, in one folder, with few and small images and a small network."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # of the features
    write_images(tmp_path / "data/train", 4, classes=CLASSES)
    write_images(tmp_path / "data/test", 1, classes=CLASSES)
    write_images(tmp_path / "photos/train", 9, (40, 30))
    write_images(tmp_path, 2, (50, 60), ["holiday", "more/than/this"])
    Image.new("RGB", (30, 20)).save(tmp_path / "photo.jpg")
    torch.save(shufflenet_v2_x0_5().state_dict(), tmp_path / "weights.pth")
    left = dict(NOT_RUN)
    for words in commands(ROOT / "README.md"):
        command = ours(words)
        if command is None or left.pop(shlex.join(words), None):
            continue
        name, arguments = command
        small = SMALL if name == "fit" and "--resume" not in arguments else []
        if name == "probe":  # whose backbone is no option, and would be downloaded
            arguments = ["shufflenet_v2_x0_5=weights.pth", *arguments[1:]]
        if "photos" in arguments and name == "fit":  # which begins with the head of `probe`
            small = [*SMALL, "--model.weights=weights.pth"]
        done = run_fit(tmp_path, name, *arguments, *small, module="cifar_transfer")
        assert "Traceback" not in done.stderr
    assert left == {}
    runs = sorted(path.name for path in tmp_path.glob("lightning_logs/*/result.json"))
    assert len(runs) == 3
    assert (tmp_path / "lightning_logs/version_0/checkpoints/best.onnx").is_file()
    assert {path.name for path in tmp_path.iterdir()} >= {"top.png", "maps"}


def test_the_python_examples_of_the_readme_run(tmp_path, monkeypatch):
    train, own = (text for _, text in blocks(ROOT / "README.md", "python"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIGHTNING_DISABLE_TIPS", "1")
    write_images(tmp_path / "data/train", 8, classes=CLASSES)
    write_images(tmp_path / "data/test", 1, classes=CLASSES)
    Image.new("RGB", (40, 30)).save("photo.jpg")
    names = {}
    small = {
        '"resnet18"': '"squeezenet1_1", "none"',
        'weights="DEFAULT"': "weights=None",
        "epochs=40": "epochs=2",
    }
    for given, instead in (small | {"unfreeze_epoch=5": "unfreeze_epoch=1"}).items():
        assert given in train + own
        train, own = train.replace(given, instead), own.replace(given, instead)
    exec(train, names)
    assert isinstance(names["trainer"], Trainer)
    assert "test/acc" in names["trainer"].callback_metrics
    assert {name for name, _ in names["likely"]} <= set(CLASSES)
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (80, 3, 16, 16), dtype=np.uint8), np.arange(80) % 3
    for split in ("train", "test"):
        np.savez(f"{split}.npz", images=pixels, labels=labels)
    exec(own, names)
    data = names["Fruit"]()
    data.setup()
    assert data.class_names == ["apple", "pear", "plum"]
    assert 0 < len(data.images["val"]) < len(data.images["train"]) < len(data.images["test"]) == 80


def test_the_checkpoint_of_the_documents_has_no_folder_in_its_name(tmp_path):
    (text,) = [text for _, text in blocks(LOGGERS, "python") if "ModelCheckpoint" in text]
    names = {}
    exec(text, names)
    keep = names["keep"]
    keep.dirpath = str(tmp_path)
    data = cifar_transfer.ShapesDataModule(train_images=60, test_images=10, batch_size=20)
    model = cifar_transfer.TransferClassifier("lenet5", "none", class_names=data.class_names)
    quiet_trainer(max_epochs=1, callbacks=[keep]).fit(model, data)
    (path,) = tmp_path.iterdir()
    assert re.fullmatch(r"0-\d\.\d{3}\.ckpt", path.name)


@pytest.mark.slow
def test_the_sweep_of_the_documents_finds_options_and_prunes():
    pytest.importorskip("optuna_integration", reason="Optuna is an optional extra")
    (text,) = [text for _, text in blocks(LOGGERS, "python") if "optuna" in text]
    tiny = {
        'CIFAR10DataModule("data", ': "ShapesDataModule(train_images=200, test_images=40, ",
        "import BackboneFreeze, CIFAR10DataModule": "import BackboneFreeze, ShapesDataModule",
        '"resnet18", lr': '"lenet5", "none", lr',
        "MedianPruner()": "MedianPruner(n_startup_trials=2)",
        "n_trials=20": "n_trials=8",
        "logger=False": 'logger=False, accelerator="cpu", enable_progress_bar=False',
    }
    for given, instead in tiny.items():
        assert given in text
        text = text.replace(given, instead)
    names = {}
    exec(text, names)
    trials = names["study"].trials
    assert len(trials) == 8
    assert {trial.state.name for trial in trials} == {"COMPLETE", "PRUNED"}
    assert names["study"].best_value > 0


def test_the_dataset_of_the_options_is_taken(monkeypatch):
    (text,) = [text for _, text in blocks(OPTIONS, "python") if "load_dataset" in text]
    rows = [{"image": Image.new("RGB", (20, 30)), "labels": row % 3} for row in range(30)]
    library = ModuleType("datasets")
    library.load_dataset = lambda name: dict.fromkeys(("train", "validation", "test"), rows)
    monkeypatch.setitem(sys.modules, "datasets", library)
    names = {}
    exec(text, names)
    data = names["data"]
    data.setup()
    assert data.num_classes == 3
    assert {split: len(images) for split, images in data.images.items()} == {
        "train": 30,
        "val": 30,
        "test": 30,
    }


def test_the_files_of_the_options_are_taken(tmp_path, monkeypatch):
    (text,) = [text for _, text in blocks(OPTIONS, "python") if "FileImages" in text]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos" / "train").mkdir(parents=True)
    for number in range(8):
        for name in ("cat", "dog"):
            Image.new("RGB", (30, 20)).save(f"photos/train/{name}{number}.jpg")
    (tmp_path / "photos" / "test").symlink_to(tmp_path / "photos" / "train")
    names = {}
    exec(text, names)
    data = names["Photos"]()
    data.setup()
    assert data.images["test"].labels.tolist() == [0] * 8 + [1] * 8
    assert data.image_size == (224, 224)


def test_the_python_example_of_the_recipes_runs():
    ((_, text),) = blocks(ROOT / "docs/recipes.md", "python")
    names = {}
    exec(text, names)
    assert [phase.epoch for phase in names["freeze"].phases] == [None, 2, 4]


@pytest.mark.slow
def test_the_python_examples_of_exports_give_what_predict_gives(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime", reason="onnxruntime is an optional extra")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = cifar_transfer.TransferClassifier(
        "squeezenet1_1", "none", class_names=["cat", "dog", "猫"]
    )
    model.network.classifier[1].weight.data.uniform_(0, 2)  # it ends with a ReLU
    geometry = replace(model.classifier.geometry, size=(32, 48))
    model.classifier.set_geometry(geometry)
    trainer = quiet_trainer()
    trainer.strategy.connect(model)
    trainer.save_checkpoint("best.ckpt")
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((70, 97), Image.Resampling.BICUBIC).save("photo.jpg", exif=exif)
    expected = cifar_transfer.Classifier.load("best.ckpt", "cpu").predict("photo.jpg")
    assert expected[0][1] - expected[-1][1] > 0.1
    examples = [text for _, text in blocks(ROOT / "docs/exports.md", "python")]
    for kind, example in zip(("onnx", "torch_export", "state_dict"), examples, strict=True):
        export("best.ckpt", kind)
        names = {}
        exec(example.replace("resnet18", "squeezenet1_1"), names)
        assert [name for name, _ in names["likely"]] == [name for name, _ in expected], kind
        shares = [share for _, share in names["likely"]]
        assert shares == pytest.approx([share for _, share in expected], abs=1e-4), kind


def test_every_recipe_is_valid_and_promises_a_result(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["fit"])
    write_images(tmp_path / "photos/train", 1)
    recipes = sorted((ROOT / "configs").glob("*.yaml"))
    assert recipes
    for recipe in recipes:
        header = recipe.read_text().split("\n\n")[0]
        assert all(line.startswith("#") for line in header.splitlines()), recipe.name
        assert re.search(r"\d %|Not measured:", header), f"{recipe.name} promises no result"
        images = ["--data.root=photos"] if recipe.stem == "photos" else []
        FitCLI(["--config", str(recipe), "--model.weights=none", *images])
