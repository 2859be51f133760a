"""What each setting gains by itself: `python -m benchmarks.settings [--compile]`.

Bare steps of ResNet18 on a batch at hand, as `fit` takes them, and the same with one setting undone (or one more done).
`--compile` adds `torch.compile`, which takes minutes to begin.
"""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models

from benchmarks.turns import alternate, table
from cifar_transfer.network import build

BATCH, SIZE, ROUNDS, MOST_SECONDS = 64, 32, 24, 60
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def network(layout: torch.memory_format = torch.channels_last, dense: bool = True) -> nn.Module:
    """ResNet18 for ten classes."""
    made = build.build_backbone("resnet18", "none", 10).network if dense else models.resnet18(num_classes=10)
    return made.to(DEVICE, memory_format=layout)


def images(count: int = BATCH, layout: torch.memory_format = torch.channels_last) -> Tensor:
    """Random images."""
    return torch.randn(count, 3, SIZE, SIZE, device=DEVICE).to(memory_format=layout)


def training(
    layout: torch.memory_format = torch.channels_last,
    dense: bool = True,
    fused: bool = True,
    autocast: bool = False,
    compiled: bool = False,
    frozen: str | None = None,
) -> Callable[[], None]:
    """A step of training.

    Args:
        layout: Of weights and images.
        dense: Small convolutions are matrix products.
        fused: One kernel for the optimizer.
        autocast: bfloat16.
        compiled: By inductor.
        frozen: None trains all. "eval" trains the head with the rest in eval mode, "no_grad" also says `no_grad`
            around it, "train" leaves its batch-norm in train mode, "graph" lets the gradients run through the backbone.
    """
    model = network(layout, dense)
    head: nn.Module = model.fc  # type: ignore[assignment]
    if frozen:
        model.train(frozen == "train")
        model.requires_grad_(frozen == "graph")
        head.requires_grad_(True)
    optimizer = torch.optim.Adam(
        (head if frozen else model).parameters(), lr=1e-4, weight_decay=1e-4, fused=fused
    )
    batch, labels = images(layout=layout), torch.arange(BATCH, device=DEVICE) % 10
    forward = torch.compile(model) if compiled else model
    if frozen == "no_grad":
        model.fc = nn.Identity()

    def step() -> None:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            if frozen == "no_grad":
                with torch.no_grad():
                    features = forward(batch)
                loss = F.cross_entropy(head(features), labels)
            else:
                loss = F.cross_entropy(forward(batch), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def evaluation(
    count: int, mode: Callable[[], AbstractContextManager[object]]
) -> Callable[[], None]:
    """1024 images evaluated in batches of `count`."""
    model, batch = network().eval(), images(count)

    def work() -> None:
        with mode():
            for _ in range(1024 // count):
                model(batch)

    return work


def transfer(pinned: bool) -> Callable[[], object]:
    """A batch of bytes copied to the GPU, and a step after it."""
    step = training()
    batch = torch.zeros(BATCH, 3, SIZE, SIZE, dtype=torch.uint8)
    batch = batch.pin_memory() if pinned else batch

    def work() -> None:
        batch.to(DEVICE, non_blocking=pinned)
        step()

    return work


def switched(owner: object, name: str, value: object) -> Callable[[], object]:
    """A step with an attribute of `torch.backends` set otherwise."""
    step, usual = training(), getattr(owner, name)

    def work() -> None:
        setattr(owner, name, value)
        step()
        setattr(owner, name, usual)

    return work


def main() -> None:
    """Print a table for training, one for the frozen phase and one for evaluation."""
    torch.manual_seed(0)
    print(
        f"{DEVICE}, {torch.get_num_threads()} threads, ResNet18, {SIZE} x {SIZE} pixels, batches of {BATCH}"
    )
    whole: dict[str, Callable[[], object]] = {
        "as in fit": training(),
        "optimizer not fused": training(fused=False),
        "not channels_last": training(torch.contiguous_format),
        "no dense convolutions": training(dense=False),
        "none of the three": training(torch.contiguous_format, dense=False, fused=False),
        "bfloat16": training(autocast=True),
    }
    if "--compile" in sys.argv:
        whole["compiled"] = training(compiled=True)
    if DEVICE == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
        whole["no cudnn.benchmark"] = switched(torch.backends.cudnn, "benchmark", False)
        whole["no TF32"] = switched(torch.backends.cudnn, "allow_tf32", False)
        whole["batch from pinned memory"], whole["batch from pageable memory"] = (
            transfer(True),
            transfer(False),
        )
    frozen: dict[str, Callable[[], object]] = {
        "frozen: as in fit (eval, requires_grad off)": training(frozen="eval"),
        "the same under no_grad": training(frozen="no_grad"),
        "batch-norm in train mode": training(frozen="train"),
        "gradients through the backbone": training(frozen="graph"),
    }
    evaluated: dict[str, Callable[[], object]] = {
        "evaluation: batches of 256, inference_mode, as in fit": evaluation(
            256, torch.inference_mode
        ),
        "batches of 64": evaluation(64, torch.inference_mode),
        "batches of 1024": evaluation(1024, torch.inference_mode),
        "no_grad instead of inference_mode": evaluation(256, torch.no_grad),
        "with gradients": evaluation(256, nullcontext),
    }
    for contestants, count in ((whole, BATCH), (frozen, BATCH), (evaluated, 1024)):
        print(table(alternate(contestants, ROUNDS, MOST_SECONDS), count))


if __name__ == "__main__":
    main()
