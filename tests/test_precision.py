"""Networks that train in half precision, from the first step to prediction."""

import math

import numpy as np
import pytest
import torch
from conftest import weights

from cifar_transfer import Classifier
from cifar_transfer.commands.evaluate import evaluate
from cifar_transfer.commands.fit import fit

JOB = [
    "--model.backbone=lenet5",
    "--model.weights=none",
    "--data=ShapesDataModule",
    "--data.train_images=150",
]
JOB += [
    "--data.test_images=40",
    "--data.batch_size=30",
    "--trainer.accelerator=cpu",
    "--trainer.max_epochs=2",
]
JOB += ["--freeze.unfreeze_epoch=1", "--report.figures=false"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("bf16-true", torch.bfloat16), ("16-true", torch.float16), ("64-true", torch.float64)],
)
def test_a_converted_network_trains_evaluates_and_predicts(tmp_path, monkeypatch, precision, dtype):
    monkeypatch.chdir(tmp_path)
    # Adam's epsilon of 1e-8 is zero in float16.
    optimizer = ["--model.optimizer=sgd"] if precision == "16-true" else []
    outcome = fit([*JOB, *optimizer, f"--trainer.precision={precision}"])
    state = weights(outcome.best)
    assert {value.dtype for value in state.values() if value.is_floating_point()} == {dtype}
    scores = evaluate(str(outcome.best), figures=False)
    assert scores["test/acc"] == pytest.approx(outcome[0]["best/test_acc"], abs=0.05), (
        "evaluated in float32"
    )
    image = np.random.default_rng(0).integers(0, 256, (40, 32, 3), dtype=np.uint8)
    found = Classifier.load(outcome.best).predict(image, top_k=10)
    assert math.isclose(sum(share for _, share in found), 1, abs_tol=1e-5)
