"""Whole uses of the program, drawn at random: data, options, a kill, predictions, an export."""

import json
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_fit, untouched
from PIL import Image
from test_killed import run_of
from test_scores import predicted

from cifar_transfer import Classifier
from cifar_transfer.commands.evaluate import evaluate
from cifar_transfer.commands.export import export

SEEDS = [pytest.param(0)]
for seed in range(1, 200):
    SEEDS.append(pytest.param(seed, marks=pytest.mark.whole))
MOMENTS = (
    "start-up",
    "mid-step",
    "half of last.ckpt",
    "moving last.ckpt",
    "validation",
    "final test",
)
# One of each list of options is drawn.
MODEL_OPTIONS = [
    [[], ["--model.schedule=cosine"], ["--model.schedule=linear", "--model.warmup_epochs=0.5"]],
    [[], ["--model.optimizer=sgd"], ["--model.optimizer=adamw", "--model.head_lr=0.01"]],
    [[], ["--trainer.val_check_interval=0.5"], ["--trainer.check_val_every_n_epoch=2"]],
    [[], ["--trainer.accumulate_grad_batches=2"], ["--trainer.gradient_clip_val=1"]],
    [[], [], ["--trainer.limit_train_batches=3"], ["--trainer.limit_val_batches=1"]],
    [[], ["--data.augment.padding_mode=reflect"], ["--data.augment.degrees=0"]],
]
FOLDER_OPTIONS = [
    [[], ["--data.cache_limit_gb=0"], ["--data.decode_size=36"]],
    [[], ["--model.image_size=32"], ["--model.image_size=48"]],
]
SHAPES_OPTIONS = [
    [[], ["--model.image_size=40", "--model.train_sizes=[32,40]"]],
]


def write_photos(root, chance):
    """Write an image folder with classes, sizes and numbers of images that are drawn at random."""
    pixels = np.random.default_rng(chance.randrange(2**32))
    class_names = ["cat", "dog", "a bird", "飞机", "$5", "x.y"]
    class_names = chance.sample(class_names, chance.randint(2, 4))
    width, height = chance.choice([(32, 32), (40, 28), (33, 33), (28, 60)])
    sizes_differ = chance.random() < 0.5
    splits = [("train", 9, 30), ("test", 1, 12)]
    if chance.random() < 0.3:
        splits.append(("val", 2, 8))
    for split, fewest, most in splits:
        for name in class_names:
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(chance.randint(fewest, most)):
                size = (width, height)
                if sizes_differ:
                    size = (width + chance.randint(0, 9), height + chance.randint(0, 9))
                ending = chance.choice(["png", "jpg", "bmp"])
                patches = pixels.integers(0, 256, (4, 5, 3), dtype=np.uint8)
                image = Image.fromarray(patches).resize(size, Image.Resampling.BICUBIC)
                image.save(folder / f"{number}.{ending}")


def draw_options(chance, has_photos):
    """Return options of a run that fit each other."""
    options = [
        f"--seed_everything={chance.randrange(1000)}",
        "--trainer.accelerator=cpu",
        "--report.figures=false",
        "--model.backbone=shufflenet_v2_x0_5",
        "--model.weights=none",
    ]
    if has_photos:
        options += ["--data=ImageFolderDataModule", "--data.root=photos", "--data.num_workers=0"]
        choices = FOLDER_OPTIONS
    else:
        options.append("--data=ShapesDataModule")
        options.append(f"--data.train_images={chance.randint(90, 160)}")
        options.append(f"--data.test_images={chance.randint(5, 60)}")
        choices = SHAPES_OPTIONS
    options.append(f"--data.batch_size={chance.randint(8, 24)}")
    options.append(f"--data.eval_batch_size={chance.randint(1, 40)}")
    options.append(f"--data.val_fraction={chance.choice([0.1, 0.2, 0.5])}")
    options.append(f"--trainer.max_epochs={chance.randint(2, 3)}")
    options.append(f"--freeze.unfreeze_epoch={chance.randint(0, 3)}")
    for alternatives in (*choices, *MODEL_OPTIONS):
        options += chance.choice(alternatives)
    return options


def train(folder, chance, options):
    """Train a run to its end. In half of the cases it is killed first, and continued."""
    if chance.random() < 0.5:
        moment = chance.choice(MOMENTS)
        killed = {"module": "killed_job", "expect": -signal.SIGKILL}
        run_fit(folder, moment, 1, *options, **killed)
    stopped_run = run_of(folder)
    if stopped_run is not None:
        options = [f"--resume={stopped_run}"]
    process = run_fit(folder, *options)
    assert "Traceback" not in process.stderr
    runs = [path.name for path in (folder / "lightning_logs").iterdir()]
    assert runs == ["version_0"]
    return run_of(folder)


def assert_scores_agree(best, result):
    """`evaluate` and `Classifier` find the accuracies that the run has recorded."""
    for split in ("val", "test"):
        scores = evaluate(str(best), split, accelerator="cpu", figures=False)
        accuracy = scores[f"{split}/acc"]
        assert accuracy == result[f"best/{split}_acc"]
        assert accuracy == pytest.approx(predicted(best, split), abs=1e-6)


def assert_predict_agrees(folder, best, result):
    """`predict` names the classes of the test images as often correctly as the run has recorded."""
    files = sorted((folder / "photos" / "test").glob("*/*"))
    options = [f"--ckpt={best}", "--format=json"]
    process = run_fit(folder, *files, *options, command="predict")
    correct = 0
    for prediction in json.loads(process.stdout):
        likeliest, _ = prediction["classes"][0]
        correct += likeliest == Path(prediction["image"]).parent.name
    assert correct / len(files) == pytest.approx(result["best/test_acc"], abs=1e-6)


def assert_export_agrees(best):
    """An exported graph names the same classes as `Classifier`."""
    export(str(best), "torch_export")
    classifier = Classifier.load(best, "cpu")
    images = torch.rand(3, 3, *classifier.size)
    graph = torch.export.load(best.with_suffix(".pt2")).module()
    labels = graph(images).argmax(1).tolist()
    predictions = classifier.predict(list(images), top_k=1)
    for label, [(name, _)] in zip(labels, predictions, strict=True):
        assert classifier.class_names[label] == name


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_a_use_of_the_whole_program(tmp_path, monkeypatch, seed):
    chance = random.Random(seed)
    has_photos = chance.random() < 0.6
    if has_photos:
        write_photos(tmp_path / "photos", chance)
    originals = list((tmp_path / "photos").glob("*/*"))
    with untouched(*originals):
        run = train(tmp_path, chance, draw_options(chance, has_photos))
        best = run / "checkpoints" / "best.ckpt"
        result = json.loads((run / "result.json").read_text())
        monkeypatch.chdir(tmp_path)  # which the root of the data is relative to
        assert_scores_agree(best, result)
        if has_photos:
            assert_predict_agrees(tmp_path, best, result)
        if chance.random() < 0.25:
            assert_export_agrees(best)
