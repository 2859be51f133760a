"""A contestant of `benchmarks.peers`: Lightning with its own callback `BackboneFinetuning`.

The module is that of the callback's documentation: `backbone` and `head`, and an optimizer that has
the head alone until the callback adds the backbone, at a tenth of the head's rate.
"""

import sys

import lightning
import torch
import torch.nn.functional as F
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import BackboneFinetuning
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from benchmarks.peer_epochs import PrintEpochs
from benchmarks.peer_job import WEIGHT_DECAY, PeerJob, loaders, network_with_head

Batch = tuple[Tensor, Tensor]


class FineTuned(LightningModule):
    """ResNet18 as a backbone and a head.

    Args:
        job: What to train.
    """

    def __init__(self, job: PeerJob) -> None:
        super().__init__()
        network = network_with_head(job)
        self.lr = job.lr
        self.head = network.fc
        network.fc = nn.Identity()
        self.backbone = network
        self.accuracy = MulticlassAccuracy(job.num_classes, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [N, classes] of normalised images [N, 3, H, W]."""
        return self.head(self.backbone(images))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Count what is classified correctly."""
        images, labels = batch
        self.accuracy(self(images), labels)
        self.log("val/acc", self.accuracy, on_epoch=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer of the head, to which the callback adds the backbone."""
        return torch.optim.AdamW(self.head.parameters(), lr=self.lr, weight_decay=WEIGHT_DECAY)


def main(job: PeerJob) -> None:
    """Train, and validate on the test images after each epoch."""
    lightning.seed_everything(job.seed, verbose=False)
    train_loader, test_loader = loaders(job)
    trainer = Trainer(
        accelerator=job.device,
        devices=1,
        max_epochs=job.epochs,
        enable_progress_bar=False,
        callbacks=[BackboneFinetuning(job.frozen_epochs), PrintEpochs(job.frozen_epochs)],
    )
    trainer.fit(FineTuned(job), train_loader, test_loader)


if __name__ == "__main__":
    main(PeerJob.from_json(sys.argv[1]))
