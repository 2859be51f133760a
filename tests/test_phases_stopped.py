"""Runs that are killed or stopped anywhere in their phases end as undisturbed ones."""

import json
import os
import signal
from itertools import chain
from pathlib import Path

import pytest
import torch
from conftest import TINY, run_fit

LAST = "lightning_logs/version_0/checkpoints/last.ckpt"
PLAN = [
    {"train": ["head"]},
    {"train": ["stage4", "conv5"], "epoch": 1, "lr": 2e-4},
    {"train": ["all"], "epoch": 2, "lr": 1e-4},
]
EPOCHS = len(PLAN)
MIXED = [
    "--model.optimizer=adamw",
    "--model.schedule=cosine",
    "--model.layer_decay=0.75",
    "--model.ema=0.99",
]
VARIANTS = {  # options, and optimizer steps an epoch
    "adam": ([], 6),
    "adamw, cosine, layer decay, average": (MIXED, 6),
    "sgd, its own head rate": (
        ["--model.optimizer=sgd", "--model.head_lr=2e-3", "--model.schedule=linear"],
        6,
    ),
    "average": (["--model.ema=0.99"], 6),
    "accumulation, average": (["--trainer.accumulate_grad_batches=2", "--model.ema=0.99"], 3),
    "clipping": (["--trainer.gradient_clip_val=0.5"], 6),
    "bf16-mixed": (["--trainer.precision=bf16-mixed"], 6),
    "bf16-mixed, average": (["--trainer.precision=bf16-mixed", "--model.ema=0.99"], 6),
    "balanced classes": (["--data.sampler=balanced", "--model.ema=0.99"], 6),
}


def moments(how, steps):
    """Return the steps at which a run ends, counted from where it continues.

    A killed run continues from the start of its epoch, a stopped one from where it was.
    """
    middle = steps // 2
    if how == "told to stop":
        return [1, middle - 1, steps - middle] * EPOCHS if middle > 1 else [1, steps - 1] * EPOCHS
    return [
        1,
        middle,
        steps,
        *chain.from_iterable([steps + 1, middle, steps] for _ in range(EPOCHS - 1)),
    ]


def same(one, other, where=""):
    """Which parts of two checkpoints differ: weights, average, optimizer, schedule, phase."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [name for key in one for name in same(one[key], other[key], f"{where}/{key}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [name for place, pair in pairs for name in same(*pair, f"{where}/{place}")]
    return (
        []
        if (torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other)
        else [where]
    )


def ends_alike(folder, how, variant, processes, count=None):
    options, steps = VARIANTS[variant]
    times = moments(how, steps)[:count]
    options = [
        *TINY,
        *options,
        f"--freeze.phases={json.dumps(PLAN)}",
        f"--trainer.max_epochs={EPOCHS}",
    ]
    if processes > 1:
        options += [f"--trainer.devices={processes}", f"--data.train_images={200 * processes}"]
        if how == "told to stop":  # they agree on it in every tenth step, so epochs have 30
            options, times = [*options, "--data.batch_size=6"], [5] * (8 if steps == 6 else 3)
    whole, part = folder / "whole", folder / "part"
    for each in (whole, part):
        each.mkdir()
    run_fit(whole, *options)
    resumed = options
    for step in times:
        expect = -signal.SIGKILL if how == "mid-step" else 128 + signal.SIGTERM
        run_fit(part, how, step, *resumed, module="killed_job", expect=expect)
        resumed = ["--resume=lightning_logs/version_0"]
    run_fit(part, *resumed)
    one, other = (torch.load(each / LAST, weights_only=True) for each in (whole, part))
    parts = ["state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch"]
    parts += [key for key in ("current_model_state", "averaged_steps") if key in one]
    for key in parts:
        assert same(one[key], other[key]) == [], key
    assert same(*(state["callbacks"]["BackboneFreeze"] for state in (one, other))) == []
    assert one["callbacks"]["BackboneFreeze"]["phase"] == EPOCHS - 1


@pytest.mark.slow
def test_stopped_again_and_again_with_an_average_ends_alike(tmp_path):
    ends_alike(tmp_path, "told to stop", "adamw, cosine, layer decay, average", 1, count=5)


@pytest.mark.whole
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("how", ["mid-step", "told to stop"])
def test_at_any_moment_of_any_phase_a_run_may_be_killed_or_stopped(
    tmp_path, monkeypatch, how, variant, processes
):
    here = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join(here)
    )  # a second process is started by `python -m killed_job`
    ends_alike(tmp_path, how, variant, processes)
