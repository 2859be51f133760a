"""A contestant of `benchmarks.peers`: fastai's `vision_learner` and `fine_tune`.

It has fastai's own head (two poolings, batch-norm, dropout, two linear layers), its split of the
backbone into layer groups, its Adam and its one-cycle rates: the head alone up to `lr`, then
everything at half of it and less towards the stem.
"""

import sys
import time

from fastai.callback.core import Callback
from fastai.callback.schedule import Learner  # with `fine_tune`
from fastai.data.transforms import Normalize
from fastai.learner import Recorder
from fastai.metrics import accuracy
from fastai.torch_core import default_device, set_seed
from fastai.vision.augment import FlipItem, RandTransform, Resize
from fastai.vision.core import PILImage
from fastai.vision.data import ImageDataLoaders
from fastai.vision.learner import model_meta, vision_learner
from torch import nn
from torchvision import models
from torchvision.transforms import v2

from benchmarks.peer_job import (
    DEVIATION,
    MEAN,
    PADDING,
    WEIGHT_DECAY,
    PeerJob,
    Phase,
    pretrained_resnet18,
    print_epoch,
)


class PaddedCrop(RandTransform):
    """Crop training images after padding them with black, which fastai has no transform for.

    Args:
        side: Side of the crop in pixels.
    """

    order = 2  # after `Resize`

    def __init__(self, side: int) -> None:
        super().__init__()
        self.crop = v2.RandomCrop(side, padding=PADDING)

    # fastai calls it for images alone, because of the type.
    def encodes(self, image: PILImage) -> PILImage:
        """Return the crop."""
        return PILImage(self.crop(image))


class PrintEpochs(Callback):
    """Print a line for each epoch."""

    order = Recorder.order + 1  # whose figures are printed

    def before_train(self) -> None:
        """Start the clock."""
        self.num_images = 0
        self.start = time.perf_counter()

    def after_batch(self) -> None:
        """Count the images of training."""
        if self.learn.training:
            self.num_images += len(self.learn.yb[0])

    def after_train(self) -> None:
        """Stop the clock."""
        self.seconds = time.perf_counter() - self.start

    def after_epoch(self) -> None:
        """Print the line."""
        phase: Phase = "unfrozen"
        if self.learn.opt.frozen_idx > 0:
            phase = "frozen"
        *_, test_accuracy = self.learn.recorder.values[-1]
        print_epoch(phase, self.num_images, self.seconds, float(test_accuracy))


def learner(job: PeerJob) -> Learner:
    """Return the learner of the images."""
    data = ImageDataLoaders.from_folder(
        job.root,
        train="train",
        valid="test",
        item_tfms=[Resize(job.image_size), PaddedCrop(job.image_size), FlipItem()],
        batch_tfms=[Normalize.from_stats(MEAN, DEVIATION)],
        bs=job.batch_size,
        num_workers=job.workers,
    )

    def architecture(pretrained: bool) -> nn.Module:
        return pretrained_resnet18(job.weights)

    return vision_learner(
        data,
        architecture,
        normalize=False,  # by what fastai knows of an architecture; here by `batch_tfms`
        splitter=model_meta[models.resnet18]["split"],
        wd=WEIGHT_DECAY,
        metrics=accuracy,
        cbs=[PrintEpochs()],
    )


def main(job: PeerJob) -> None:
    """Train, and validate on the test images after each epoch."""
    set_seed(job.seed)
    default_device(job.device == "cuda")
    learn = learner(job)
    with learn.no_bar():
        learn.fine_tune(job.unfrozen_epochs, base_lr=job.lr, freeze_epochs=job.frozen_epochs)


if __name__ == "__main__":
    main(PeerJob.from_json(sys.argv[1]))
