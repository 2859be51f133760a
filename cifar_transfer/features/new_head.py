"""A network gets the head that was fitted on its features."""

from typing import Any

import numpy as np
import torch
from lightning import Trainer
from torch import Tensor

from cifar_transfer.base.errors import UserError
from cifar_transfer.data.geometry import to_float
from cifar_transfer.data.module import ImageDataModule
from cifar_transfer.features.extract import FeatureExtractor
from cifar_transfer.features.logistic import LinearHead, fit_logistic
from cifar_transfer.features.standardise import fit_standardisation
from cifar_transfer.network.image_classifier import ImageClassifier

MAX_SAMPLE_IMAGES = 16  # on which the logits are compared


def set_head(classifier: ImageClassifier, head: LinearHead, images: Tensor) -> None:
    """Give a network this head. Of several heads, whose logits it averages, the first gets it all.

    Args:
        classifier: Network in eval mode.
        head: New head.
        images: Images, uint8 [B, 3, H, W], on which the logits are compared.

    Raises:
        UserError: The logits of the network are not those of its head.
    """
    layers = [classifier.network.get_submodule(name) for name in classifier.heads]
    with torch.no_grad():
        for layer in layers:
            for parameter in layer.parameters():
                parameter.zero_()
        layers[0].get_parameter("weight").copy_(head.weight * len(layers))
        layers[0].get_parameter("bias").copy_(head.bias * len(layers))
        with classifier.features() as passes:
            logits = classifier(to_float(images).to(classifier.device)).cpu()
    expected = passes[0] @ head.weight.T + head.bias
    tolerance = 1e-3 * float(expected.abs().max())
    if not torch.allclose(logits, expected, rtol=1e-3, atol=tolerance):
        raise UserError(
            f"{classifier.backbone} cannot be probed, because it does more with its "
            f"head's logits: take another."
        )


def sample_images(data: ImageDataModule) -> Tensor:
    """Return the first validation images, uint8 [B, 3, H, W], for `set_head`."""
    images = data.images["val"]
    return torch.from_numpy(images.pixels(np.arange(min(MAX_SAMPLE_IMAGES, len(images)))))


def begin_with_logistic(
    trainer: Trainer, classifier: ImageClassifier, data: ImageDataModule
) -> None:
    """Within a fit, give a network the best logistic regression on the features of its backbone.

    All processes call this together. Modes (train or eval) stay as they are.

    Raises:
        UserError: See `FeatureExtractor`, its `compute`, and `set_head`.
    """
    modes = {module: module.training for module in classifier.modules()}
    extractor = FeatureExtractor(classifier, data, test=False)
    features = extractor.compute(trainer)
    fitted: Any = None  # in the other processes, until the first one sends it
    if trainer.is_global_zero:
        train = features["train"]
        standardisation = fit_standardisation(train)
        fitted = fit_logistic(train, features["val"], data.num_classes, standardisation)
    head, _ = trainer.strategy.broadcast(fitted)
    set_head(classifier, head, sample_images(data))
    for module, training in modes.items():
        module.training = training
