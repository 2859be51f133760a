"""What each setting gains by itself: `python -m benchmarks.settings [--compile]`.

Bare steps of ResNet18 on a batch at hand, as `fit` takes them, and the same with one setting undone
(or one more done). `--compile` adds `torch.compile`, which takes minutes to begin.
"""

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models

from benchmarks.turns import alternate, table
from cifar_transfer.network.image_classifier import ImageClassifier, NetworkOptions

BATCH_SIZE = 64
EVALUATED_IMAGES = 1024
IMAGE_SIDE = 32  # pixels
MAX_ROUNDS = 24
MAX_SECONDS = 60  # of a table
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def network(layout: torch.memory_format = torch.channels_last, dense: bool = True) -> nn.Module:
    """Return ResNet18 for ten classes; `dense`: small convolutions are matrix products."""
    if dense:
        made = ImageClassifier(NetworkOptions("resnet18", "none")).network
    else:
        made = models.resnet18(num_classes=10)
    return made.to(device=DEVICE).to(memory_format=layout)


def images(count: int, layout: torch.memory_format = torch.channels_last) -> Tensor:
    """Return random images."""
    return torch.randn(count, 3, IMAGE_SIDE, IMAGE_SIDE, device=DEVICE).to(memory_format=layout)


def training(
    layout: torch.memory_format = torch.channels_last,
    dense: bool = True,
    fused: bool = True,
    autocast: bool = False,
    compiled: bool = False,
) -> Callable[[], None]:
    """Return a step of training.

    Args:
        layout: Memory format of weights and images.
        dense: Small convolutions are matrix products.
        fused: One kernel for the optimizer.
        autocast: Compute in bfloat16 where autocast does.
        compiled: Compile the network by inductor.
    """
    model = network(layout, dense)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, weight_decay=1e-4, fused=fused)
    batch = images(BATCH_SIZE, layout)
    labels = torch.arange(BATCH_SIZE, device=DEVICE) % 10
    forward = torch.compile(model) if compiled else model

    def step() -> None:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            loss = F.cross_entropy(forward(batch), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def training_of_head(
    train_mode: bool = False, gradients: bool = False, no_grad: bool = False
) -> Callable[[], None]:
    """Return a step of training with a frozen backbone.

    Args:
        train_mode: Leave the batch-norm of the backbone in train mode.
        gradients: Let the gradients run through the backbone.
        no_grad: Compute the backbone under `torch.no_grad`.
    """
    model = network()
    head: nn.Module = model.fc  # type: ignore[assignment]
    model.train(train_mode)
    model.requires_grad_(gradients)
    head.requires_grad_(True)
    if no_grad:
        model.fc = nn.Identity()
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-4, weight_decay=1e-4, fused=True)
    batch = images(BATCH_SIZE)
    labels = torch.arange(BATCH_SIZE, device=DEVICE) % 10

    def logits() -> Tensor:
        if not no_grad:
            return model(batch)
        with torch.no_grad():
            features = model(batch)
        return head(features)

    def step() -> None:
        loss = F.cross_entropy(logits(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def evaluation(
    count: int, mode: Callable[[], AbstractContextManager[object]]
) -> Callable[[], None]:
    """Return the evaluation of all images in batches of `count`, in a mode of autograd."""
    model = network().eval()
    batch = images(count)

    def evaluate() -> None:
        with mode():
            for _ in range(EVALUATED_IMAGES // count):
                model(batch)

    return evaluate


def transfer(pinned: bool) -> Callable[[], object]:
    """Return the copy of a batch of bytes to the GPU, and a step after it."""
    step = training()
    batch = torch.zeros(BATCH_SIZE, 3, IMAGE_SIDE, IMAGE_SIDE, dtype=torch.uint8)
    if pinned:
        batch = batch.pin_memory()

    def copy_and_step() -> None:
        batch.to(DEVICE, non_blocking=pinned)
        step()

    return copy_and_step


def switched(owner: object, name: str, value: object) -> Callable[[], object]:
    """Return a step with an attribute of `torch.backends` set otherwise."""
    step = training()
    usual = getattr(owner, name)

    def switch_and_step() -> None:
        setattr(owner, name, value)
        step()
        setattr(owner, name, usual)

    return switch_and_step


def training_steps(with_compile: bool) -> dict[str, Callable[[], object]]:
    """Return steps of training everything, as in `fit` and with one setting changed."""
    steps: dict[str, Callable[[], object]] = {
        "as in fit": training(),
        "optimizer not fused": training(fused=False),
        "not channels_last": training(torch.contiguous_format),
        "no dense convolutions": training(dense=False),
        "none of the three": training(torch.contiguous_format, dense=False, fused=False),
        "bfloat16": training(autocast=True),
    }
    if with_compile:
        steps["compiled"] = training(compiled=True)
    if DEVICE == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
        steps["no cudnn.benchmark"] = switched(torch.backends.cudnn, "benchmark", False)
        steps["no TF32"] = switched(torch.backends.cudnn, "allow_tf32", False)
        steps["batch from pinned memory"] = transfer(True)
        steps["batch from pageable memory"] = transfer(False)
    return steps


def frozen_steps() -> dict[str, Callable[[], object]]:
    """Return steps with a frozen backbone, as in `fit` and in other ways."""
    return {
        "frozen: as in fit (eval, requires_grad off)": training_of_head(),
        "the same under no_grad": training_of_head(no_grad=True),
        "batch-norm in train mode": training_of_head(train_mode=True),
        "gradients through the backbone": training_of_head(gradients=True),
    }


def evaluations() -> dict[str, Callable[[], object]]:
    """Return evaluations of all images, as in `fit` and in other ways."""
    return {
        "evaluation: batches of 256, inference_mode, as in fit": evaluation(
            256, torch.inference_mode
        ),
        "batches of 64": evaluation(64, torch.inference_mode),
        "batches of 1024": evaluation(1024, torch.inference_mode),
        "no_grad instead of inference_mode": evaluation(256, torch.no_grad),
        "with gradients": evaluation(256, nullcontext),
    }


def main(args: Sequence[str]) -> None:
    """Print a table for training, one for the frozen phase and one for evaluation."""
    torch.manual_seed(0)
    print(
        f"{DEVICE}, {torch.get_num_threads()} threads, ResNet18, {IMAGE_SIDE} x {IMAGE_SIDE} "
        f"pixels, batches of {BATCH_SIZE}"
    )
    for contestants, count in (
        (training_steps("--compile" in args), BATCH_SIZE),
        (frozen_steps(), BATCH_SIZE),
        (evaluations(), EVALUATED_IMAGES),
    ):
        print(table(alternate(contestants, MAX_ROUNDS, MAX_SECONDS), count))


if __name__ == "__main__":
    main(sys.argv[1:])
