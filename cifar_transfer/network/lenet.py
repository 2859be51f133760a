"""LeNet-5, the network of 1998."""

from collections import OrderedDict

from torch import nn


def lenet5(num_classes: int) -> nn.Sequential:
    """Return LeNet-5 for three channels and 32 x 32 pixels (LeCun et al. 1998, section II.B).

    Its last layer is a linear one, where the paper has radial basis functions.
    """
    features = nn.Sequential(
        nn.Conv2d(3, 6, 5),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Conv2d(16, 120, 5),
        nn.Tanh(),
        nn.Flatten(),
    )
    classifier = nn.Sequential(
        nn.Linear(120, 84),
        nn.Tanh(),
        nn.Linear(84, num_classes),
    )
    return nn.Sequential(OrderedDict(features=features, classifier=classifier))
