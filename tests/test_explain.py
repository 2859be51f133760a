"""Heat maps are the paper's, and pictures of predictions have room for every name."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from matplotlib.text import Text
from torch import nn

from cifar_transfer.base.errors import UserError
from cifar_transfer.data.geometry import to_float
from cifar_transfer.inference.explain import heat_map
from cifar_transfer.network.image_classifier import ImageClassifier, NetworkOptions
from cifar_transfer.results.gallery import gallery, heated
from cifar_transfer.results.predictions import ImagePrediction

LONG = (
    "a name that is much longer than those of CIFAR-10, " * 2
    + "with_one_word_that_has_no_space_at_all_in_it_to_be_broken_at"
)
NAMES = ["cat", "飞机飞机飞机飞机飞机飞机飞机飞机飞机飞机飞机飞机", "$5 or $6", LONG]


def predictions_of(images, classes):
    return [
        ImagePrediction(f"some/folder/{i}.png", pixels, classes) for i, pixels in enumerate(images)
    ]


def texts_of(figure):
    """Return the texts that are drawn, with their boxes. Axes that are off draw no labels."""
    figure.draw_without_rendering()
    hidden = set()
    for axes in figure.axes:
        if not axes.axison:
            hidden.update(axes.xaxis.findobj())
            hidden.update(axes.yaxis.findobj())
    texts = []
    for text in figure.findobj(Text):
        if text.get_text() and text.get_visible() and text not in hidden:
            texts.append((text.get_text(), text.get_window_extent()))
    return texts


def assert_nothing_is_cut(figure):
    """All words are within the figure, and no two of them overlap."""
    texts = texts_of(figure)
    page = figure.bbox
    for text, box in texts:
        assert page.x0 <= box.x0, text
        assert page.y0 <= box.y0, text
        assert box.x1 <= page.x1, text
        assert box.y1 <= page.y1, text
    for (text, box), (other_text, other_box) in combinations(texts, 2):
        assert not box.padded(-1).overlaps(other_box.padded(-1)), (text, other_text)


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (30, 3, 32, 32), dtype=np.uint8)


@pytest.mark.parametrize("count", [1, 5])
def test_long_and_chinese_names_fit_into_a_gallery(pixels, count):
    classes = list(zip(NAMES, (0.7, 0.2, 0.0999, 0.0001), strict=True))
    assert_nothing_is_cut(gallery(predictions_of(pixels[:count], classes), count))


@pytest.mark.parametrize("name", NAMES)
def test_a_long_or_chinese_name_fits_into_a_heat_map(pixels, name):
    [prediction] = predictions_of(pixels[:1], [(name, 0.5)])
    assert_nothing_is_cut(heated(prediction, np.ones((32, 32))))


def test_a_gallery_says_how_many_images_there_are_if_it_has_not_all(pixels):
    figure = gallery(predictions_of(pixels, [("cat", 0.7)]), 1234)
    assert figure.get_suptitle() == "The first 24 of 1,234 images"
    assert len([axes for axes in figure.axes if axes.images]) == 24


def test_bars_are_as_long_as_probabilities():
    black = np.zeros((3, 32, 32), np.uint8)
    prediction = ImagePrediction("x.png", black, [("cat", 0.75), ("dog", 0.25)])
    figure = gallery([prediction], 1)
    widths = [patch.get_width() for axes in figure.axes for patch in axes.patches]
    assert widths == [1, 0.75, 1, 0.25]


@pytest.mark.parametrize(
    ("options", "layer", "class_tokens"),
    [
        ({"backbone": "resnet18"}, "layer2", 0),
        ({"backbone": "mobilenet_v2"}, "features.6", 0),
        ({"backbone": "timm/vit_tiny_patch16_224", "image_size": 64}, "blocks.10", 1),
    ],
    ids=["resnet18", "mobilenet_v2", "vit"],
)
def test_a_heat_map_is_that_of_the_paper(options, layer, class_tokens):
    """The last layer with 4 x 4 positions, channels weighted by the mean gradient, ReLU."""
    torch.manual_seed(0)
    classifier = ImageClassifier(NetworkOptions(weights="none", **options)).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32), dtype=np.uint8)
    outputs = []
    classifier.network.get_submodule(layer).register_forward_hook(
        lambda _, __, output: outputs.append(output)
    )
    logits = classifier(to_float(torch.from_numpy(pixels))[None])
    values = outputs[0]
    gradient = torch.autograd.grad(logits[0, logits.argmax()], values)[0]
    if class_tokens:
        values = values[:, class_tokens:].transpose(1, 2).reshape(1, -1, 4, 4)
        gradient = gradient[:, class_tokens:].transpose(1, 2).reshape(1, -1, 4, 4)
    assert values.shape[2:] == (4, 4)
    weights = gradient.mean((0, 2, 3))
    small = torch.einsum("c,chw->hw", weights, values[0]).clamp(min=0).detach()
    expected = nn.functional.interpolate(small[None, None], size=(32, 32), mode="bilinear")[0, 0]
    heat = heat_map(classifier.requires_grad_(False), pixels)
    assert heat.max() == 1
    np.testing.assert_allclose(heat, (expected / expected.max()).numpy(), atol=1e-4)


@pytest.mark.parametrize("width", [32, 48])
def test_the_heat_is_where_the_class_is(width):
    """A network that counts red pixels and then copies the count, as VGG does, and a red corner."""
    statistics = [[0.0] * 3, [1.0] * 3]
    options = NetworkOptions("lenet5", "none", num_classes=2, normalize=statistics)
    classifier = ImageClassifier(options).eval()
    colour = nn.Conv2d(3, 2, 1, bias=False)
    colour.weight.data = torch.tensor([[1.0, -1, -1], [-1, -1, 1]])[..., None, None]
    pools = nn.AvgPool2d(4), nn.AvgPool2d(8), nn.AdaptiveAvgPool2d(7)
    classifier.network = nn.Sequential(colour, nn.ReLU(), *pools, nn.Flatten())
    classifier.set_geometry(replace(classifier.geometry, size=(32, width)))
    pixels = np.full((3, 32, width), 128, np.uint8)
    pixels[:, 16:, 24:] = np.array([255, 0, 0])[:, None, None]
    heat = heat_map(classifier, pixels)
    assert heat[20:28, 28:].min() > 0.9
    assert heat[:12].max() == 0
    assert heat[:, :20].max() == 0


@pytest.mark.parametrize("portrait", [False, True])
def test_heat_is_placed_on_the_centre_if_the_network_sees_only_that(portrait):
    """A network that counts red pixels: the red edge of the centre is within the long image."""
    options = NetworkOptions("lenet5", "none", num_classes=2, normalize=[[0.0] * 3, [1.0] * 3])
    classifier = ImageClassifier(options).eval()
    colour = nn.Conv2d(3, 2, 1, bias=False)
    colour.weight.data = torch.tensor([[1.0, -1, -1], [-1, -1, 1]])[..., None, None]
    classifier.network = nn.Sequential(colour, nn.ReLU(), nn.AvgPool2d(4), nn.Flatten())
    size = (96, 32) if portrait else (32, 96)
    classifier.set_geometry(replace(classifier.geometry, size=size, input_side=32))
    pixels = np.full((3, 32, 96), 128, np.uint8)
    pixels[:, :, 32:40] = np.array([255, 0, 0])[:, None, None]  # the left edge of the centre
    pixels[:, :, :24] = np.array([255, 0, 0])[:, None, None]  # what the network does not see
    if portrait:
        pixels = pixels.transpose(0, 2, 1).copy()
    heat = heat_map(classifier, pixels)
    if portrait:
        heat = heat.T
    assert heat[:, 32:36].min() > 0.9
    assert heat[:, :32].max() == 0
    assert heat[:, 48:].max() == 0


def test_a_network_without_positions_has_no_heat_map():
    classifier = ImageClassifier(NetworkOptions("lenet5", "none", num_classes=2)).eval()
    classifier.network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 2))
    with pytest.raises(UserError, match="There is no heat map of lenet5"):
        heat_map(classifier, np.zeros((3, 32, 32), np.uint8))
