"""Whole uses of the program, drawn at random: options, data, a kill, then evaluation, prediction and export."""

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

from cifar_transfer import Classifier, TransferClassifier
from cifar_transfer.commands.evaluate import evaluate
from cifar_transfer.commands.export import export

SEEDS = [pytest.param(seed, marks=() if seed < 1 else pytest.mark.whole) for seed in range(200)]
MOMENTS = (
    "start-up",
    "mid-step",
    "half of last.ckpt",
    "moving last.ckpt",
    "validation",
    "final test",
)


def photos(root, chance):
    """An image folder of classes, sizes and numbers of images drawn at random."""
    pixels = np.random.default_rng(chance.randrange(2**32))
    names = chance.sample(["cat", "dog", "a bird", "飞机", "$5", "x.y"], chance.randint(2, 4))
    base = chance.choice([(32, 32), (40, 28), (33, 33), (28, 60)])
    mixed = chance.random() < 0.5
    for split, fewest, most in [("train", 9, 30), ("test", 1, 12)] + [("val", 2, 8)] * (
        chance.random() < 0.3
    ):
        for name in names:
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(chance.randint(fewest, most)):
                size = (
                    (base[0] + chance.randint(0, 9), base[1] + chance.randint(0, 9))
                    if mixed
                    else base
                )
                ending = chance.choice(["png", "jpg", "bmp"])
                patches = pixels.integers(0, 256, (4, 5, 3), dtype=np.uint8)
                Image.fromarray(patches).resize(size, Image.Resampling.BICUBIC).save(
                    folder / f"{number}.{ending}"
                )


def job(chance, folder):
    """Options of a run, which fit each other."""
    options = [
        f"--seed_everything={chance.randrange(1000)}",
        "--trainer.accelerator=cpu",
        "--report.figures=false",
    ]
    options += ["--model.backbone=shufflenet_v2_x0_5", "--model.weights=none"]
    if folder:
        options += ["--data=ImageFolderDataModule", "--data.root=photos", "--data.num_workers=0"]
        options += chance.choice([[], ["--data.cache_limit_gb=0"], ["--data.decode_size=36"]])
        options += chance.choice([[], ["--model.image_size=32"], ["--model.image_size=48"]])
    else:
        train, test = chance.randint(90, 160), chance.randint(5, 60)
        options += [
            "--data=ShapesDataModule",
            f"--data.train_images={train}",
            f"--data.test_images={test}",
        ]
        options += chance.choice([[], ["--model.image_size=40", "--model.train_sizes=[32,40]"]])
    options += [
        f"--data.batch_size={chance.randint(8, 24)}",
        f"--data.eval_batch_size={chance.randint(1, 40)}",
    ]
    options += [
        f"--data.val_fraction={chance.choice([0.1, 0.2, 0.5])}",
        f"--trainer.max_epochs={chance.randint(2, 3)}",
    ]
    options += [f"--freeze.unfreeze_epoch={chance.randint(0, 3)}"]
    options += chance.choice(
        [[], ["--model.schedule=cosine"], ["--model.schedule=linear", "--model.warmup_epochs=0.5"]]
    )
    options += chance.choice(
        [[], ["--model.optimizer=sgd"], ["--model.optimizer=adamw", "--model.head_lr=0.01"]]
    )
    options += chance.choice(
        [[], ["--trainer.val_check_interval=0.5"], ["--trainer.check_val_every_n_epoch=2"]]
    )
    options += chance.choice(
        [[], ["--trainer.accumulate_grad_batches=2"], ["--trainer.gradient_clip_val=1"]]
    )
    options += chance.choice(
        [[], [], ["--trainer.limit_train_batches=3"], ["--trainer.limit_val_batches=1"]]
    )
    return options + chance.choice(
        [[], ["--data.augment.padding_mode=reflect"], ["--data.augment.degrees=0"]]
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_a_use_of_the_whole_program(tmp_path, monkeypatch, seed):
    chance = random.Random(seed)
    folder = chance.random() < 0.6
    if folder:
        photos(tmp_path / "photos", chance)
    originals = [path for path in (tmp_path / "photos").glob("*/*")]
    with untouched(*originals):
        options = job(chance, folder)
        if chance.random() < 0.5:
            moment, number = chance.choice(MOMENTS), 1
            run_fit(tmp_path, moment, number, *options, module="killed_job", expect=-signal.SIGKILL)
        begun = run_of(tmp_path)
        said = run_fit(tmp_path, *([f"--resume={begun}"] if begun else options))
        assert "Traceback" not in said.stderr
        run = run_of(tmp_path)
        assert [path.name for path in (tmp_path / "lightning_logs").iterdir()] == ["version_0"]
        best = run / "checkpoints" / "best.ckpt"
        result = json.loads((run / "result.json").read_text())
        monkeypatch.chdir(tmp_path)  # where the root of the data is relative to
        for split in ("val", "test"):
            score = evaluate(str(best), split, accelerator="cpu", figures=False)[f"{split}/acc"]
            assert score == result[f"best/{split}_acc"]
            assert score == pytest.approx(predicted(best, split), abs=1e-6)
        if folder:
            files = sorted((tmp_path / "photos" / "test").glob("*/*"))
            printed = json.loads(
                run_fit(
                    tmp_path, *files, f"--ckpt={best}", "--format=json", command="predict"
                ).stdout
            )
            right = [Path(one["image"]).parent.name == one["classes"][0][0] for one in printed]
            assert sum(right) / len(right) == pytest.approx(result["best/test_acc"], abs=1e-6)
        if chance.random() < 0.25:
            exported(best)


def exported(best):
    """Other logits than the checkpoint's are refused by `export` itself."""
    export(str(best), "torch_export")
    size = TransferClassifier.load_from_checkpoint(best).geometry.size
    images = torch.rand(3, 3, *size)
    graph = torch.export.load(best.with_suffix(".pt2")).module()
    said = Classifier.load(best, "cpu").predict(list(images), top_k=1)
    likeliest = graph(images).argmax(1).tolist()
    names = Classifier.load(best, "cpu").names
    assert [names[row] for row in likeliest] == [one[0][0] for one in said]
