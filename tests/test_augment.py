"""Augmentation of a batch: each operation and their distribution, compared with torchvision's."""

from dataclasses import replace
from itertools import permutations

import pytest
import torch
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import functional

from cifar_transfer.base.errors import UserError
from cifar_transfer.data.augment import Augmentation, Parameters, augment
from cifar_transfer.data.colours import BRIGHTNESS, CONTRAST, HUE, SATURATION

MODES = ["constant", "reflect"]
SIZES = [(32, 32), (24, 37), (31, 16)]
OFF = {
    "padding": 0,
    "flip": 0.0,
    "brightness": 0.0,
    "contrast": 0.0,
    "saturation": 0.0,
    "hue": 0.0,
    "degrees": 0.0,
}


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors gain nothing from threads, and lose much if other programs use the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pictures(count: int, height: int = 32, width: int = 32, darkest: int = 0) -> Tensor:
    """Return colour gradients with an off-centre rectangle and a little noise.

    All are different; uint8 [count, 3, H, W].
    """
    generator = torch.Generator().manual_seed(7)
    y = torch.linspace(0, 1, height)[:, None]
    x = torch.linspace(0, 1, width)
    slopes = torch.rand(3, count, 3, 1, 1, generator=generator)
    images = (slopes[0] * x + slopes[1] * y) / 2 + slopes[2] / 3
    images[:, :, height // 4 : height // 2, width // 8 : width // 3] = torch.rand(
        count, 3, 1, 1, generator=generator
    )
    images += torch.rand(images.shape, generator=generator) / 20
    return (images * (255 - darkest) + darkest).clamp(0, 255).to(torch.uint8)


def parameters(count: int, **changes: Tensor) -> Parameters:
    """Return parameters that change nothing, but for `changes`."""
    nothing = Parameters(
        shift=torch.zeros(count, 2, dtype=torch.int64),
        flip=torch.zeros(count, dtype=torch.bool),
        angle=torch.zeros(count),
        factors=torch.ones(count, 3),
        hue=torch.zeros(count),
        order=torch.arange(4).repeat(count, 1),
    )
    return replace(nothing, **changes)


def crop(image: Tensor, down: int, right: int, mode: str) -> Tensor:
    """Return what torchvision cuts out of an image padded by 4, off its middle."""
    padded = functional.pad(image, [4], padding_mode=mode)
    height, width = image.shape[1:]
    return functional.crop(padded, 4 + down, 4 + right, height, width)


def one_by_one(images: Tensor, given: Parameters, mode: str = "constant") -> Tensor:
    """Return what torchvision makes of each image, one operation after the other."""
    results = []
    for k, image in enumerate(images.float() / 255):
        down, right = given.shift[k].tolist()
        image = crop(image, down, right, mode)
        if given.flip[k]:
            image = functional.hflip(image)
        brightness, contrast, saturation = given.factors[k].tolist()
        for operation in given.order[k].tolist():
            if operation == BRIGHTNESS:
                image = functional.adjust_brightness(image, brightness)
            elif operation == CONTRAST:
                image = functional.adjust_contrast(image, contrast)
            elif operation == SATURATION:
                image = functional.adjust_saturation(image, saturation)
            elif operation == HUE:
                image = functional.adjust_hue(image, given.hue[k].item())
        results.append(functional.rotate(image, given.angle[k].item()))
    return torch.stack(results)


def share_of_different_pixels(result: Tensor, expected: Tensor, tolerance: float = 1e-5) -> float:
    return ((result - expected).abs().amax(1) > tolerance).float().mean().item()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", MODES)
def test_crop_is_torchvisions_for_every_shift(size, mode):
    shifts = torch.cartesian_prod(torch.arange(-4, 5), torch.arange(-4, 5))
    images, given = pictures(len(shifts), *size), parameters(len(shifts), shift=shifts)
    crops = [
        crop(image, *shift, mode) for image, shift in zip(images, shifts.tolist(), strict=True)
    ]
    assert torch.equal(augment(images, given, mode), torch.stack(crops) / 255)


@pytest.mark.parametrize("size", SIZES)
def test_flip_is_torchvisions(size):
    images, flip = pictures(6, *size), torch.tensor([True, False, False, True, True, False])
    result = augment(images, parameters(6, flip=flip))
    assert torch.equal(
        result, torch.where(flip[:, None, None, None], images.flip(-1), images) / 255
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("shift", [(0, 0), (4, -3)])
def test_rotation_after_crop_and_flip_is_torchvisions(size, flip, shift):
    angles = torch.tensor(
        [-170.0, -44.0, -15.0, -7.3, -0.4, 0.0, 0.4, 3.1, 10.0, 15.0, 61.0, 100.0]
    )
    count = len(angles)
    images = pictures(count, *size)
    given = parameters(
        count, angle=angles, flip=torch.full((count,), flip), shift=torch.tensor([shift] * count)
    )
    assert share_of_different_pixels(augment(images, given), one_by_one(images, given)) <= 1e-3


@pytest.mark.parametrize("operation", [BRIGHTNESS, CONTRAST, SATURATION])
@pytest.mark.parametrize("shift", [0, 3])
def test_colour_factors_are_torchvisions(operation, shift):
    values = torch.tensor([0.0, 0.5, 0.8, 0.97, 1.0, 1.2, 2.0])
    factors = torch.ones(len(values), 3)
    factors[:, operation] = values
    images, shifts = pictures(len(values)), torch.full((len(values), 2), shift)
    given = parameters(len(values), factors=factors, shift=shifts)
    torch.testing.assert_close(augment(images, given), one_by_one(images, given), atol=1e-5, rtol=0)


def test_hue_is_torchvisions_on_pictures_and_on_all_corner_colours():
    levels = torch.tensor([0, 1, 100, 254, 255], dtype=torch.uint8)
    colours = torch.cartesian_prod(levels, levels, levels).t().reshape(3, 5, 25)
    turns = torch.tensor([-0.5, -0.3, -0.1, -0.01, 0.03, 0.1, 0.25, 0.5])
    for images in (pictures(8), colours.repeat(8, 1, 1, 1)):
        given = parameters(8, hue=turns)
        result = augment(images, given)
        torch.testing.assert_close(result, one_by_one(images, given), atol=1e-5, rtol=0)
        assert result.min() >= 0
        assert result.max() <= 1


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", MODES)
def test_whole_pipeline_is_torchvisions_in_every_order(size, mode):
    torch.manual_seed(1)
    orders = torch.tensor(list(permutations(range(4)))).repeat(4, 1)
    count = len(orders)
    # Strong changes, so that values are clamped on the way and the order matters.
    given = replace(Augmentation(4, 0.5, 0.6, 0.6, 0.6, 0.3, 20).draw(count), order=orders)
    images = pictures(count, *size)
    result, expected = augment(images, given, mode), one_by_one(images, given, mode)
    assert share_of_different_pixels(result, expected) <= 1e-3
    assert result.min() >= 0
    assert result.max() <= 1
    one_order = replace(given, order=orders[:1].expand(count, 4))
    assert share_of_different_pixels(augment(images, one_order, mode), expected) > 0.5


def test_off_is_exact():
    images = pictures(5, 20, 33)
    assert torch.equal(Augmentation(**OFF)(images), images / 255)


@pytest.mark.parametrize("name", sorted(OFF))
def test_each_option_switches_its_own_operation(name):
    torch.manual_seed(2)
    images = pictures(16)
    value = {"padding": 4, "flip": 1.0, "hue": 0.1, "degrees": 15.0}.get(name, 0.2)
    result = Augmentation(**{**OFF, name: value})(images)
    assert all(
        not torch.equal(after, before / 255) for after, before in zip(result, images, strict=True)
    )
    drawn, nothing = Augmentation(**{**OFF, name: value}).draw(16), parameters(16)
    field = {"padding": "shift", "degrees": "angle", "hue": "hue", "flip": "flip"}.get(
        name, "factors"
    )
    for other in ("shift", "flip", "angle", "factors", "hue"):
        assert torch.equal(getattr(drawn, other), getattr(nothing, other)) == (other != field)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"padding": -1}, "padding is -1"),
        ({"flip": 1.1}, "to 1"),
        ({"flip": -0.1}, "flip"),
        ({"hue": 0.6}, "to 0.5"),
        ({"brightness": -0.1}, "brightness"),
        ({"contrast": float("nan")}, "contrast"),
        ({"saturation": float("inf")}, "saturation"),
        ({"degrees": -15.0}, "degrees"),
        ({"padding_mode": "symmetric"}, "constant or reflect"),
    ],
)
def test_wrong_options_are_refused(options, word):
    with pytest.raises(UserError, match=word):
        Augmentation(**options)


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 1, 32, 32), (0,)])
def test_wrong_shape_is_refused(shape):
    with pytest.raises(ValueError, match="expected images of shape"):
        Augmentation()(torch.zeros(shape, dtype=torch.uint8))


def test_an_image_reflects_no_further_than_it_is_wide():
    images = pictures(2, 4, 9)
    assert (
        Augmentation(**OFF | {"padding": 3}, padding_mode="reflect")(images).shape == images.shape
    )
    with pytest.raises(
        UserError, match="padding is 4, but images of 9 x 4 pixels reflect at most 3"
    ):
        Augmentation(**OFF | {"padding": 4}, padding_mode="reflect")(images)


def test_images_do_not_depend_on_the_rest_of_the_batch():
    torch.manual_seed(3)
    images, given = pictures(12, 24, 37), Augmentation().draw(12)
    together = augment(images, given)
    for k in range(12):
        alone = augment(images[k : k + 1], given[torch.tensor([k])])
        torch.testing.assert_close(alone, together[k : k + 1], atol=1e-6, rtol=0)
    assert augment(images[:0], given[torch.arange(0)]).shape == (0, 3, 24, 37)


def test_input_is_kept_and_may_be_float():
    images, before = pictures(8), pictures(8)
    torch.manual_seed(4)
    result = Augmentation()(images)
    assert torch.equal(images, before)
    assert result.dtype == torch.float32
    floats = images / 255
    torch.manual_seed(4)
    assert torch.equal(Augmentation()(floats), result)
    assert torch.equal(floats, before / 255)


def test_seed_decides():
    images, results = pictures(8), []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        results.append(Augmentation()(images))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_nothing_is_read_back_from_the_device():
    # A tensor on "meta" has no values: to read one, which on a GPU means to wait, is an error.
    images = torch.empty(16, 3, 32, 32, dtype=torch.uint8, device="meta")
    assert Augmentation()(images).device.type == "meta"


def test_parameters_are_drawn_as_torchvision_draws_them():
    torch.manual_seed(8)
    count = 24_000
    drawn = Augmentation(flip=0.3).draw(count)

    # Each bound is about 5 standard deviations.
    for shift in drawn.shift.unbind(1):
        assert shift.min() == -4
        assert shift.max() == 4
        torch.testing.assert_close(
            (shift + 4).bincount() / count, torch.full((9,), 1 / 9), atol=0.01, rtol=0
        )
    assert abs(drawn.flip.float().mean() - 0.3) < 0.015
    for values, low, high in (
        (drawn.angle, -15, 15),
        *((factor, 0.8, 1.2) for factor in drawn.factors.unbind(1)),
        (drawn.hue, -0.1, 0.1),
    ):
        uniform = (values - low) / (high - low)
        assert uniform.min() >= -1e-6
        assert uniform.max() <= 1 + 1e-6
        assert (uniform.sort().values - torch.linspace(0, 1, count)).abs().max() < 0.02
    orders, counts = drawn.order.unique(dim=0, return_counts=True)
    assert orders.tolist() == [list(order) for order in permutations(range(4))]
    assert (counts - count / 24).abs().max() < 5 * (count / 24) ** 0.5

    columns = [
        drawn.shift,
        drawn.flip[:, None],
        drawn.angle[:, None],
        drawn.factors,
        drawn.hue[:, None],
    ]
    columns.append(drawn.order[:, :1])
    table = torch.cat(columns, 1).double()
    neighbours = torch.cat(
        (table[:-1], table[1:]), 1
    )  # an image's parameters and those of the image after it
    correlation = torch.corrcoef(neighbours.t()) - torch.eye(2 * table.shape[1])
    assert correlation.abs().max() < 0.035


def test_strong_factors_are_not_negative():
    torch.manual_seed(9)
    factors = Augmentation(brightness=3.0).draw(1000).factors[:, BRIGHTNESS]
    assert 0 <= factors.min() < 0.1
    assert 3.9 < factors.max() <= 4


def describe(images: Tensor) -> dict[str, Tensor]:
    """Return figures of each image, of which each operation changes some.

    Images are float [B, 3, H, W].
    """
    red, green, blue = images.unbind(1)
    black = (images.amax(1) < 4 / 255).float()
    half = images.shape[-1] // 2
    return {
        **{
            f"mean of {name}": plane.mean((1, 2))
            for name, plane in (("red", red), ("green", green), ("blue", blue))
        },
        "spread": images.std((1, 2, 3)),
        "chroma": (images.amax(1) - images.amin(1)).mean((1, 2)),
        "red less blue": (red - blue).mean((1, 2)),
        "left less right": (
            images[..., :half].mean((1, 2, 3)) - images[..., half:].mean((1, 2, 3))
        ),
        "black": black.mean((1, 2)),
        "black in a corner": black[:, :6, :6].mean((1, 2)),
    }


def distance(first: Tensor, second: Tensor) -> float:
    """Return the Kolmogorov-Smirnov statistic.

    It is the largest difference between the distribution functions of two samples.
    """
    both = torch.cat((first, second)).sort().values
    shares = [
        torch.searchsorted(sample.sort().values, both, right=True) / len(sample)
        for sample in (first, second)
    ]
    return (shares[0] - shares[1]).abs().max().item()


def test_results_are_distributed_as_torchvisions():
    torch.manual_seed(10)
    count = 1500
    # One picture over and over, so that only the augmentation differs, without black of its own.
    picture = pictures(1, darkest=40)
    pipeline = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(0.5),
            transforms.ColorJitter(0.2, 0.2, 0.2, 0.1),
            transforms.RandomRotation(15),
            transforms.ToTensor(),
        ]
    )
    pil = functional.to_pil_image(picture[0])
    expected = describe(torch.stack([pipeline(pil) for _ in range(count)]))
    images = picture.expand(count, -1, -1, -1)
    result = describe(Augmentation()(images))
    # Two samples of one distribution are further apart than this once in ten thousand.
    bound = 2.23 * (2 / count) ** 0.5
    for name in expected:
        assert result[name].mean().item() == pytest.approx(
            expected[name].mean().item(), abs=0.01
        ), name
        assert result[name].std().item() == pytest.approx(expected[name].std().item(), rel=0.08), (
            name
        )
        assert distance(result[name], expected[name]) < bound, name
    # Without any one of the operations, some figure is distributed otherwise.
    for name in OFF:
        without = describe(Augmentation(**{name: 0})(images))
        assert max(distance(without[key], expected[key]) for key in expected) > bound, name
