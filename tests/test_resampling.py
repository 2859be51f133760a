"""Crops of any size, turns and shifts in one sampling, compared with torchvision's operations."""

import pytest
import torch
from test_augment import OFF, describe, distance, pictures
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from cifar_transfer.base.errors import UserError
from cifar_transfer.data.augment import Augmentation
from cifar_transfer.data.resampling import (
    Placement,
    draw_crops,
    draw_erased,
    erase,
    resample,
)

SIZES = [(32, 32), (24, 37), (61, 16)]
BILINEAR = functional.InterpolationMode.BILINEAR
COUNT = 3000
# Two samples of COUNT of one distribution are further apart than this once in ten thousand.
BOUND = 2.23 * (2 / COUNT) ** 0.5


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors gain nothing from threads, and lose much if other programs use the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def whole(count, size, **changes):
    """Return a placement that changes nothing, but for `changes`."""
    nothing = {
        "crop": torch.tensor([0.0, 0.0, *map(float, size)]).repeat(count, 1),
        "flip": torch.zeros(count, dtype=torch.bool),
        "angle": torch.zeros(count),
        "translate": torch.zeros(count, 2),
    }
    return Placement(**(nothing | changes))


@pytest.mark.parametrize("size", SIZES)
def test_nothing_changes_where_nothing_is_asked_for(size):
    images = pictures(3, *size) / 255
    result = resample(images, whole(3, size), size, "bilinear")
    torch.testing.assert_close(result, images, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("flip", [False, True])
def test_a_crop_is_torchvisions(size, flip):
    torch.manual_seed(0)
    count = 40
    images = pictures(count, *size) / 255
    crop = draw_crops(count, size, [0.05, 1.0], [0.5, 2.0])
    placement = whole(count, size, crop=crop, flip=torch.full((count,), flip))
    result = resample(images, placement, size, "bilinear")
    for image, box, ours in zip(images, crop.int().tolist(), result, strict=True):
        expected = functional.resized_crop(image, *box, size=list(size), antialias=False)
        if flip:
            expected = functional.hflip(expected)
        torch.testing.assert_close(ours, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_a_turn_and_a_shift_are_torchvisions(size, mode):
    angles = torch.tensor([-170.0, -44.0, -15.0, -7.3, 0.0, 0.4, 3.1, 10.0, 61.0, 100.0])
    count = len(angles)
    translate = torch.linspace(-0.4, 0.3, 2 * count).view(count, 2)
    images = pictures(count, *size) / 255
    placement = whole(count, size, angle=angles, translate=translate)
    result = resample(images, placement, size, mode)
    different = 0.0
    for row in range(count):
        down = round(translate[row, 0].item() * size[0])
        right = round(translate[row, 1].item() * size[1])
        expected = functional.affine(
            images[row],
            -angles[row].item(),  # torchvision's affine turns clockwise
            [right, down],
            scale=1.0,
            shear=[0.0, 0.0],
            interpolation=functional.InterpolationMode(mode),
        )
        different += ((result[row] - expected).abs() > 1e-4).float().mean().item()
    assert different / count < (2e-3 if mode == "nearest" else 1e-6)


@pytest.mark.parametrize("size", [*SIZES, (7, 90)])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.9, 1.0)])
def test_crops_are_drawn_as_torchvision_draws_them(size, scale):
    torch.manual_seed(1)
    ours = draw_crops(COUNT, size, scale, [3 / 4, 4 / 3])
    image = torch.zeros(3, *size)
    reference = v2.RandomResizedCrop(size, scale=scale)
    drawn = [reference.make_params([image]) for _ in range(COUNT)]
    for column, name in enumerate(("top", "left", "height", "width")):
        theirs = torch.tensor([float(parameters[name]) for parameters in drawn])
        assert distance(ours[:, column], theirs) < BOUND, name


@pytest.mark.parametrize("size", SIZES)
def test_rectangles_to_erase_are_drawn_as_torchvision_draws_them(size):
    torch.manual_seed(2)
    ours = draw_erased(COUNT, size, probability=0.6)
    assert (ours[:, 2] > 0).float().mean().item() == pytest.approx(0.6, abs=0.05)
    ours = draw_erased(COUNT, size, probability=1.0)
    ours = ours[ours[:, 2] > 0]
    reference = v2.RandomErasing(p=1.0)
    image = torch.zeros(3, *size)
    drawn = [reference.make_params([image]) for _ in range(COUNT)]
    for column, name in enumerate("ijhw"):
        theirs = torch.tensor(
            [float(parameters[name]) for parameters in drawn if parameters["v"] is not None]
        )
        assert distance(ours[:, column], theirs) < BOUND, name


def test_only_the_rectangle_is_erased():
    images = pictures(3, 10, 12, darkest=40) / 255
    before = images.clone()
    erase(images, torch.tensor([[2.0, 3.0, 4.0, 5.0], [0, 0, 0, 0], [9, 11, 1, 1]]))
    expected = before.clone()
    expected[0, :, 2:6, 3:8] = 0
    expected[2, :, 9, 11] = 0
    assert torch.equal(images, expected)


PHOTOS = {
    **OFF,
    "crop_scale": [0.35, 1.0],
    "flip": 0.5,
    "brightness": 0.3,
    "contrast": 0.3,
    "saturation": 0.3,
    "hue": 0.05,
    "degrees": 20.0,
    "translate": 0.1,
    "erase": 0.3,
    "interpolation": "bilinear",
}


@pytest.mark.slow
@pytest.mark.parametrize("size", [(32, 32), (24, 37)])
def test_results_are_distributed_as_torchvisions(size):
    torch.manual_seed(3)
    count = 1500
    # Darker on its left, so that a flip is seen, without black of its own.
    picture = (pictures(1, *size, darkest=120) * torch.linspace(0.5, 1, size[1])).byte()
    pipeline = v2.Compose(
        [
            v2.ToDtype(torch.float32, scale=True),
            v2.RandomResizedCrop(size, scale=(0.35, 1.0), antialias=False),
            v2.RandomHorizontalFlip(0.5),
            # With a `fill` it would mix the edge with black twice.
            v2.RandomAffine(20, translate=(0.1, 0.1), interpolation=BILINEAR, fill=None),
            v2.ColorJitter(0.3, 0.3, 0.3, 0.05),
            v2.RandomErasing(0.3),
        ]
    )
    expected = describe(torch.stack([pipeline(picture[0]) for _ in range(count)]))
    images = picture.expand(count, -1, -1, -1)
    result = describe(Augmentation(**PHOTOS)(images))
    bound = 2.23 * (2 / count) ** 0.5
    for name in expected:
        assert distance(result[name], expected[name]) < bound, name
    # Without any one of the operations, some figure is distributed otherwise.
    for name in ("crop_scale", "flip", "brightness", "contrast", "degrees", "translate", "erase"):
        off = {"crop_scale": [1.0, 1.0], "translate": 0.0, "erase": 0.0} | OFF
        without = describe(Augmentation(**PHOTOS | {name: off[name]})(images))
        assert max(distance(without[key], expected[key]) for key in expected) > bound, name


def test_interpolation_alone_changes_no_crop():
    torch.manual_seed(4)
    images = pictures(8)
    nearest = Augmentation(degrees=0.0)(images)
    torch.manual_seed(4)
    assert torch.equal(Augmentation(degrees=0.0, interpolation="bilinear")(images), nearest)


@pytest.mark.parametrize("mode", ["constant", "reflect"])
def test_a_padded_crop_is_the_same_with_interpolation(mode):
    images = pictures(8, 20, 33)
    options = OFF | {"padding": 4, "flip": 0.5, "padding_mode": mode}
    torch.manual_seed(5)
    looked_up = Augmentation(**options)(images)
    torch.manual_seed(5)
    # So little a turn that no pixel changes, but all are sampled.
    sampled = Augmentation(**(options | {"degrees": 1e-6}), interpolation="bilinear")(images)
    torch.testing.assert_close(sampled, looked_up, atol=2e-5, rtol=0)


def test_input_is_kept_and_may_be_float_of_any_memory_format():
    images = pictures(8, 24, 37)
    before = images.clone()
    torch.manual_seed(6)
    result = Augmentation(**PHOTOS)(images)
    assert torch.equal(images, before)
    assert result.shape == images.shape
    floats = (images / 255).contiguous(memory_format=torch.channels_last)
    kept = floats.clone()
    torch.manual_seed(6)
    torch.testing.assert_close(Augmentation(**PHOTOS)(floats), result, atol=1e-5, rtol=0)
    assert torch.equal(floats, kept)


def test_nothing_is_read_back_from_the_device():
    # A tensor on "meta" has no values: to read one, which on a GPU means to wait, is an error.
    images = torch.empty(16, 3, 32, 32, dtype=torch.uint8, device="meta")
    assert Augmentation(**PHOTOS)(images).device.type == "meta"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"crop_scale": [0.0, 1.0]}, r"crop_scale is \[0.0, 1.0\].* such as \[0.35, 1\]"),
        ({"crop_scale": [0.5]}, "crop_scale"),
        ({"crop_scale": [0.5, 1.5]}, "crop_scale"),
        ({"crop_scale": [0.8, 0.5]}, "crop_scale"),
        ({"crop_ratio": [0.0, 1.0]}, "crop_ratio"),
        ({"translate": -0.1}, "translate"),
        ({"erase": 1.5}, "erase"),
        ({"interpolation": "bicubic"}, "nearest or bilinear"),
    ],
)
def test_wrong_options_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        Augmentation(**options)
