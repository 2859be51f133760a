"""Heat maps are the paper's, and pictures of predictions have room for every name."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.text import Text
from torch import nn

from cifar_transfer import TransferClassifier
from cifar_transfer.base.errors import UserError
from cifar_transfer.data.geometry import to_float
from cifar_transfer.inference.explain import heat_map
from cifar_transfer.results.gallery import gallery, heated
from cifar_transfer.results.predictions import ImagePrediction

LONG = (
    "a name that is much longer than those of CIFAR-10, " * 2
    + "with_one_word_that_has_no_space_at_all_in_it_to_be_broken_at"
)
NAMES = ["cat", "飞机飞机飞机飞机飞机飞机飞机飞机飞机飞机飞机飞机", "$5 or $6", LONG]


def answers_to(images, classes):
    return [
        ImagePrediction(f"some/folder/{i}.png", pixels, classes) for i, pixels in enumerate(images)
    ]


def assert_nothing_is_cut(figure):
    """All words are within the figure, and no two of them overlap."""
    figure.draw_without_rendering()
    off = {
        text
        for axes in figure.axes
        if not axes.axison
        for axis in (axes.xaxis, axes.yaxis)
        for text in axis.findobj()
    }
    texts = [
        text
        for text in figure.findobj(Text)
        if text.get_text() and text.get_visible() and text not in off
    ]
    boxes = [text.get_window_extent() for text in texts]
    whole = figure.bbox
    for text, box in zip(texts, boxes, strict=True):
        inside = (
            whole.x0 <= box.x0 and whole.y0 <= box.y0 and box.x1 <= whole.x1 and box.y1 <= whole.y1
        )
        assert inside, text.get_text()
    for i, (one, text) in enumerate(zip(boxes, texts, strict=True)):
        for other, also in zip(boxes[i + 1 :], texts[i + 1 :], strict=True):
            assert not one.padded(-1).overlaps(other.padded(-1)), (text.get_text(), also.get_text())


def test_long_and_chinese_names_fit_into_the_figures():
    pixels = np.random.default_rng(0).integers(0, 256, (30, 3, 32, 32), dtype=np.uint8)
    classes = [(name, share) for name, share in zip(NAMES, (0.7, 0.2, 0.0999, 0.0001), strict=True)]
    for number in (1, 5):
        figure = gallery(answers_to(pixels[:number], classes), number)
        assert_nothing_is_cut(figure)
    figure = gallery(answers_to(pixels, classes[:1]), 1234)
    assert figure.get_suptitle() == "The first 24 of 1,234 images"
    assert len([axes for axes in figure.axes if axes.images]) == 24
    for name in NAMES:
        assert_nothing_is_cut(heated(answers_to(pixels[:1], [(name, 0.5)])[0], np.ones((32, 32))))


def test_bars_are_as_long_as_probabilities():
    pixels = np.zeros((3, 32, 32), np.uint8)
    figure = gallery([ImagePrediction("x.png", pixels, [("cat", 0.75), ("dog", 0.25)])], 1)
    widths = [patch.get_width() for axes in figure.axes for patch in axes.patches]
    assert widths == [1, 0.75, 1, 0.25]


@pytest.mark.parametrize(
    ("options", "layer", "tokens"),
    [
        ({"backbone": "resnet18"}, "layer2", 0),
        ({"backbone": "mobilenet_v2"}, "features.6", 0),
        ({"backbone": "timm/vit_tiny_patch16_224", "image_size": 64}, "blocks.10", 1),
    ],
    ids=lambda value: value.get("backbone", "") if isinstance(value, dict) else "",
)
def test_heat_maps_are_those_of_the_paper(options, layer, tokens):
    """The last layer with 4 x 4 places, its channels weighted by the mean gradient, ReLU, the largest 1."""
    torch.manual_seed(0)
    model = TransferClassifier(weights="none", **options).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32), dtype=np.uint8)
    kept = []
    model.network.get_submodule(layer).register_forward_hook(
        lambda _, __, output: kept.append(output)
    )
    logits = model(to_float(torch.from_numpy(pixels))[None])
    gradient = torch.autograd.grad(logits[0, logits.argmax()], kept[0])[0]
    values = kept[0]
    if tokens:
        values, gradient = (
            part[:, tokens:].transpose(1, 2).reshape(1, -1, 4, 4) for part in (values, gradient)
        )
    assert values.shape[2:] == (4, 4)
    small = torch.einsum("c,chw->hw", gradient.mean((0, 2, 3)), values[0]).clamp(min=0).detach()
    expected = nn.functional.interpolate(small[None, None], size=(32, 32), mode="bilinear")[0, 0]
    heat = heat_map(model.requires_grad_(False), pixels)
    assert heat.max() == 1
    np.testing.assert_allclose(heat, (expected / expected.max()).numpy(), atol=1e-4)


@pytest.mark.parametrize("width", [32, 48])
def test_the_heat_is_where_the_class_is(width):
    """A network that counts red pixels and then repeats the count, as VGG does, and an image red in one corner."""
    model = TransferClassifier(
        "lenet5", "none", num_classes=2, normalize=[[0.0] * 3, [1.0] * 3]
    ).eval()
    colour = nn.Conv2d(3, 2, 1, bias=False)
    colour.weight.data = torch.tensor([[1.0, -1, -1], [-1, -1, 1]])[..., None, None]
    pools = nn.AvgPool2d(4), nn.AvgPool2d(8), nn.AdaptiveAvgPool2d(7)
    model.network = nn.Sequential(colour, nn.ReLU(), *pools, nn.Flatten())
    model.geometry = replace(model.geometry, size=(32, width))
    pixels = np.full((3, 32, width), 128, np.uint8)
    pixels[:, 16:, 24:] = np.array([255, 0, 0])[:, None, None]
    heat = heat_map(model, pixels)
    assert heat[20:28, 28:].min() > 0.9
    assert heat[:12].max() == 0
    assert heat[:, :20].max() == 0


def test_a_network_without_places_has_no_heat_map():
    model = TransferClassifier("lenet5", "none", num_classes=2).eval()
    model.network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 2))
    with pytest.raises(UserError, match="There is no heat map of lenet5"):
        heat_map(model, np.zeros((3, 32, 32), np.uint8))
