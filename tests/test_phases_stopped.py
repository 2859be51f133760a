"""Runs that are killed or stopped anywhere in their phases end as undisturbed ones."""

import json
import os
import signal
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

    Args:
        how: "mid-step" for a kill, "told to stop" for a stop.
        steps: Optimizer steps in an epoch.
    """
    middle = steps // 2
    if how == "told to stop":
        if middle > 1:
            return [1, middle - 1, steps - middle] * EPOCHS
        return [1, steps - 1] * EPOCHS
    first_epoch = [1, middle, steps]
    later_epoch = [steps + 1, middle, steps]
    return first_epoch + later_epoch * (EPOCHS - 1)


def differing_parts(one, other, name=""):
    """Return the names of the parts of two checkpoints that differ."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        pairs = [(f"{name}/{key}", one[key], other[key]) for key in one]
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = [(f"{name}/{index}", one[index], other[index]) for index in range(len(one))]
    elif isinstance(one, torch.Tensor):
        return [] if torch.equal(one, other) else [name]
    else:
        return [] if one == other else [name]
    parts = []
    for part, *values in pairs:
        parts += differing_parts(*values, part)
    return parts


def assert_ends_alike(folder, how, variant, processes, count=None):
    """Compare a run that is ended at its first `count` moments with one that is not."""
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
            options.append("--data.batch_size=6")
            times = [5] * (8 if steps == 6 else 3)
    whole = folder / "whole"
    whole.mkdir()
    run_fit(whole, *options)
    part = folder / "part"
    part.mkdir()
    expect = -signal.SIGKILL if how == "mid-step" else 128 + signal.SIGTERM
    for step in times:
        run_fit(part, how, step, *options, module="killed_job", expect=expect)
        options = ["--resume=lightning_logs/version_0"]
    run_fit(part, *options)

    one = torch.load(whole / LAST, weights_only=True)
    other = torch.load(part / LAST, weights_only=True)
    keys = ["state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch"]
    keys += [key for key in ("current_model_state", "averaged_steps") if key in one]
    for key in keys:
        assert differing_parts(one[key], other[key]) == [], key
    freeze = one["callbacks"]["BackboneFreeze"]
    assert differing_parts(freeze, other["callbacks"]["BackboneFreeze"]) == []
    assert freeze["phase"] == EPOCHS - 1


@pytest.mark.whole
def test_stopped_again_and_again_with_an_average_ends_alike(tmp_path):
    assert_ends_alike(tmp_path, "told to stop", "adamw, cosine, layer decay, average", 1, count=5)


@pytest.mark.whole
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("how", ["mid-step", "told to stop"])
def test_at_any_moment_of_any_phase_a_run_may_be_killed_or_stopped(
    tmp_path, monkeypatch, how, variant, processes
):
    # A second process is started by `python -m killed_job`.
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    assert_ends_alike(tmp_path, how, variant, processes)
