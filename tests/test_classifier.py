"""The network's input, and what the module refuses."""

import pytest
import torch
from torch import nn

from cifar_transfer import TransferClassifier
from cifar_transfer.errors import UserError
from cifar_transfer.normalize import STATISTICS

TINY = "shufflenet_v2_x0_5"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "resnet81"}, "resnet18"),
        ({"weights": "IMAGENET1K_V9"}, "IMAGENET1K_V1"),
        ({"weights": "gone/w.pth"}, "neither a file"),
        ({"num_classes": 3, "class_names": ["a", "b"]}, "the data have 2 classes"),
        ({"normalize": "imagnet"}, "imagenet"),
        ({"normalize": [[0.5, 0.5], [0.2, 0.2]]}, "two triples"),
        ({"normalize": [[0.5] * 3, [0.2, 0.0, 0.2]]}, "two triples"),
        ({"lr": 0.0}, "lr is 0"),
        ({"lr_factor": 1.0}, "lr_factor"),
        ({"image_size": 0}, "image_size"),
    ],
)
def test_mistakes_get_a_sentence(options, message):
    with pytest.raises(UserError, match=message) as error:
        TransferClassifier(**{"backbone": TINY, "weights": "none"} | options)
    assert "\n" not in str(error.value)


def test_input_is_resized_and_normalised():
    class Recorder(nn.Module):
        def forward(self, images):
            self.seen = images
            return images.new_zeros(len(images), 10)

    images = torch.rand(2, 3, 32, 32)
    for normalize in ("cifar10", "imagenet", [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]):
        model = TransferClassifier(TINY, "none", image_size=48, normalize=normalize)
        model.network = Recorder()
        model(images)
        mean, std = STATISTICS.get(normalize, normalize) if isinstance(normalize, str) else normalize
        resized = nn.functional.interpolate(images, size=(48, 48), mode="bilinear", antialias=True)
        for channel in range(3):
            expected = (resized[:, channel] - mean[channel]) / std[channel]
            torch.testing.assert_close(model.network.seen[:, channel], expected)
