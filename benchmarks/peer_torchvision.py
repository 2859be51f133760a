"""A contestant of `benchmarks.peers`: the loop of torchvision's reference scripts.

Written here in the manner of torchvision's `references/classification/train.py`, which is not in
its wheel: one loop, AdamW, cosine by epochs, the loss and the accuracy of each step as numbers. It
has no frozen phase: everything trains in all epochs.
"""

import sys
import time

import torch
from torch import nn
from torch.utils.data import DataLoader

from benchmarks.peer_job import WEIGHT_DECAY, PeerJob, loaders, network_with_head, print_epoch


def train_one_epoch(
    network: nn.Module,
    criterion: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: DataLoader,
    device: torch.device,
) -> int:
    """Train on each image once, and return their number."""
    network.train()
    num_images = 0
    sum_loss = 0.0
    num_correct = 0.0
    for images, labels in loader:
        images = images.to(device)
        labels = labels.to(device)
        output = network(images)
        loss = criterion(output, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        num_correct += (output.argmax(1) == labels).sum().item()
        sum_loss += loss.item() * len(labels)
        num_images += len(labels)
    print(f"loss {sum_loss / num_images:.4f}, accuracy {num_correct / num_images:.2%}", flush=True)
    return num_images


def evaluate(network: nn.Module, loader: DataLoader, device: torch.device) -> float:
    """Return the share of the images that are classified correctly."""
    network.eval()
    num_images = 0
    num_correct = 0.0
    with torch.inference_mode():
        for images, labels in loader:
            images = images.to(device, non_blocking=True)
            labels = labels.to(device, non_blocking=True)
            output = network(images)
            num_correct += (output.argmax(1) == labels).sum().item()
            num_images += len(labels)
    return num_correct / num_images


def main(job: PeerJob) -> None:
    """Train, and evaluate after each epoch."""
    torch.manual_seed(job.seed)
    device = torch.device(job.device)
    train_loader, test_loader = loaders(job)
    network = network_with_head(job).to(device)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.AdamW(network.parameters(), lr=job.lr, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=job.epochs)
    for epoch in range(job.epochs):
        start = time.perf_counter()
        num_images = train_one_epoch(network, criterion, optimizer, train_loader, device)
        seconds = time.perf_counter() - start
        schedule.step()
        accuracy = evaluate(network, test_loader, device)
        print_epoch("unfrozen", num_images, seconds, accuracy)
        checkpoint = {
            "model": network.state_dict(),
            "optimizer": optimizer.state_dict(),
            "epoch": epoch,
        }
        torch.save(checkpoint, "checkpoint.pth")


if __name__ == "__main__":
    main(PeerJob.from_json(sys.argv[1]))
