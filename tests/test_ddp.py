"""Two real processes (gloo): ranks stay equal, and a step equals one on the joint batch."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, once, quiet_trainer, run_fit, weights

from cifar_transfer import ShapesDataModule, TransferClassifier

JOB = Path(__file__).with_name("ddp_job.py")


def run(folder, strategy, devices, *plan):
    command = [sys.executable, JOB, folder, strategy, str(devices), *plan]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stdout + done.stderr


def results(folder, devices):
    """What each rank saw, and its scores in the test."""
    ranks = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(devices)]
    return ranks, [
        torch.load(folder / f"test{rank}.pt", weights_only=True) for rank in range(devices)
    ]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """`--trainer.devices=2` alone."""
    return results(once(tmp_path_factory, "ddp", lambda folder: run(folder, "auto", 2)), 2)


def first_convolution(state):
    """Return the weights of ShuffleNet's first layer in a state dict."""
    (name,) = [name for name in state if name.endswith("network.conv1.0.weight")]
    return state[name]


def assert_equal_ranks(ranks):
    first, second = (rank["state"] for rank in ranks)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_ranks_are_equal_to_the_last_bit_after_the_unfreezing(plain):
    ranks, _ = plain
    assert ranks[0]["wrappers"] == [1, 1, 1], (
        "the wrapper of the frozen phase, and its hooks, are gone"
    )
    assert_equal_ranks(ranks)
    assert ranks[0]["val"] == ranks[1]["val"], "the schedule must see one loss"
    before, after = ranks[0]["steps"][0]["before"], ranks[0]["state"]
    assert not torch.equal(first_convolution(before), first_convolution(after)), "it did unfreeze"


@pytest.mark.whole
@pytest.mark.parametrize("strategy", ["ddp", "ddp_find_unused_parameters_true"])
def test_ranks_are_equal_under_the_named_strategies(tmp_path, strategy):
    run(tmp_path, strategy, 2)
    ranks, _ = results(tmp_path, 2)
    assert_equal_ranks(ranks)


@pytest.fixture(scope="module")
def phases(tmp_path_factory):
    """Three phases: the head, then two stages more, then everything."""
    return results(
        once(tmp_path_factory, "ddp-phases", lambda folder: run(folder, "auto", 2, "phases")), 2
    )


HEAD = ("fc.",)
MIDDLE = ("fc.", "stage4.", "conv5.")
ALL = ("",)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("job", "epoch", "trains"),
    [
        ("plain", 0, HEAD),
        ("plain", 1, ALL),
        pytest.param("plain", 2, ALL, marks=pytest.mark.whole),
        pytest.param("phases", 0, HEAD, marks=pytest.mark.whole),
        pytest.param("phases", 1, MIDDLE, marks=pytest.mark.whole),
        pytest.param("phases", 2, ALL, marks=pytest.mark.whole),
    ],
)
def test_a_step_has_the_gradients_of_one_process_on_the_joint_batch(request, job, epoch, trains):
    ranks, _ = request.getfixturevalue(job)
    assert_equal_ranks(ranks)
    steps = [rank["steps"][epoch] for rank in ranks]
    assert not torch.equal(steps[0]["images"], steps[1]["images"]), "each rank has its own images"
    assert [list(step["gradients"]) for step in steps] == [list(steps[0]["gradients"])] * 2
    model = TransferClassifier("shufflenet_v2_x0_5", "none", normalize="cifar10")
    model.load_state_dict(steps[0]["before"])
    model.eval()
    images, labels = (torch.cat([step[key] for step in steps]) for key in ("images", "labels"))
    F.cross_entropy(model(images), labels).backward()
    for name, parameter in model.named_parameters():
        if not name.partition("network.")[2].startswith(trains):
            assert name not in steps[0]["gradients"], (
                "nothing is computed or sent for what is frozen"
            )
            continue
        for step in steps:
            torch.testing.assert_close(
                step["gradients"][name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name
            )


def test_every_test_image_counts_once(tmp_path, plain):
    """45 images over two ranks: repeats that make the ranks even would change accuracy and loss."""
    ranks, figures = plain
    assert figures[0] == figures[1]
    correct = figures[0]["test/acc"] * 45
    assert abs(correct - round(correct)) < 1e-4
    data = ShapesDataModule(train_images=160, test_images=45)
    model = TransferClassifier("shufflenet_v2_x0_5", "none", class_names=data.class_names)
    model.load_state_dict(ranks[0]["state"])
    alone = quiet_trainer(default_root_dir=tmp_path).test(model, data, verbose=False)[0]
    assert figures[0] == pytest.approx(alone, rel=1e-5)


@pytest.mark.whole
def test_the_command_runs_and_resumes_on_two_processes(tmp_path):
    options = [*TINY, "--trainer.devices=2", "--trainer.max_epochs=2", "--freeze.unfreeze_epoch=1"]
    done = run_fit(tmp_path, *options)
    assert done.stdout.count("test accuracy") == 1, "one process speaks"
    assert done.stdout.count("  2/2  ") == 1
    run = tmp_path / "lightning_logs" / "version_0"
    before = weights(run / "checkpoints" / "last.ckpt")
    done = run_fit(tmp_path, f"--resume={run}", "--trainer.max_epochs=3")
    assert "  3/3  " in done.stdout
    assert [path.name for path in (tmp_path / "lightning_logs").iterdir()] == ["version_0"]
    after = weights(run / "checkpoints" / "last.ckpt")
    assert not torch.equal(first_convolution(before), first_convolution(after))


@pytest.mark.whole
@pytest.mark.skipif(
    not Path("/proc/self/task").is_dir(), reason="names of threads are in Linux's /proc"
)
@pytest.mark.parametrize(
    ("end", "status"),
    [("", 0), ("error", 2), ("stop", 128 + signal.SIGTERM)],
)
def test_no_thread_of_the_process_group_outlives_the_job(tmp_path, end, status):
    """A thread that freed a tensor while the interpreter ended aborted one run of ten."""
    job = [
        *TINY,
        "--trainer.devices=2",
        "--trainer.max_epochs=5",
        "--data.batch_size=15",
        "--freeze.unfreeze_epoch=0",
    ]
    job[job.index("--model.backbone=shufflenet_v2_x0_5")] = "--model.backbone=lenet5"
    command = [sys.executable, JOB.with_name("ddp_exit_job.py"), end, *job]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=240, stdin=subprocess.DEVNULL
    )
    assert done.returncode == status, done.stdout + done.stderr
    left = {path.name: path.read_text() for path in tmp_path.glob("threads*")}
    both = {"threads0": "", "threads1": ""}
    assert left in (both, {"threads0": ""}) if end == "stop" else left == both, (
        "Lightning kills a stopped run's second"
    )
