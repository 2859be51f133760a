import numpy as np
import pytest

from cifar_transfer.base.errors import UserError
from cifar_transfer.data.shapes import TASKS, draw


@pytest.mark.parametrize("task", TASKS)
def test_images_and_labels(task):
    images, labels = draw(task, 250, seed=3)
    assert images.dtype == np.uint8
    assert images.shape == (250, 32, 32, 3)
    assert labels.dtype == np.int64
    assert labels.shape == (250,)
    assert np.bincount(labels, minlength=10).tolist() == [25] * 10
    assert (np.diff(labels) < 0).sum() > 50, "shuffled, not sorted"


def test_a_count_that_ten_does_not_divide_stays_balanced_across_chunks():
    _, labels = draw("upstream", 2015, seed=0)
    assert sorted(np.bincount(labels)) == [201] * 5 + [202] * 5


def test_tasks_have_ten_classes_each_and_share_none():
    assert all(len(set(names)) == 10 for names in TASKS.values())
    assert not set(TASKS["upstream"]) & set(TASKS["downstream"])


def test_same_arguments_same_images():
    first, again = draw("downstream", 40, seed=7), draw("downstream", 40, seed=7)
    assert np.array_equal(first[0], again[0])
    assert np.array_equal(first[1], again[1])


def test_no_image_twice():
    drawn = [draw(task, 60, seed)[0] for task in TASKS for seed in (0, 1)]
    assert len({image.tobytes() for images in drawn for image in images}) == 240


@pytest.mark.parametrize("task", TASKS)
def test_every_shape_stands_out_from_its_background(task):
    """The commonest lightness of the middle differs from that of the border: the shape is there, and contrasts."""
    images, labels = draw(task, 500, seed=0)
    light = images.mean(-1)
    border = np.median(
        np.concatenate([light[:, :2].reshape(500, -1), light[:, -2:].reshape(500, -1)], 1), 1
    )
    inked = (np.abs(light - border[:, None, None]) > 50).mean((1, 2))
    for label, name in enumerate(TASKS[task]):
        assert 0.08 < np.median(inked[labels == label]) < 0.5, name


@pytest.mark.parametrize("task", TASKS)
def test_pixels_are_useless_to_a_linear_classifier_and_the_outline_is_not(task):
    """Ridge regression to one-hot labels fails on pixels but, on what rotation leaves of the shape, does far better.

    What rotation leaves: how far from its centre of mass the ink lies, as a histogram in units of its own size.
    """

    def accuracy(features, labels, ridge):
        features = np.concatenate([features, np.ones((len(features), 1))], 1)
        train, test = slice(0, 1800), slice(1800, None)
        a, b = features[train], np.eye(10)[labels[train]]
        weights = a.T @ np.linalg.solve(
            a @ a.T + ridge * np.eye(len(a)), b
        )  # the dual form: fewer images than pixels
        return ((features[test] @ weights).argmax(1) == labels[test]).mean()

    images, labels = draw(task, 3000, seed=0)
    pixels = images.reshape(len(images), -1) / 255 - 0.5
    assert accuracy(pixels, labels, ridge=100.0) < 0.22

    border = np.median(images[:, [0, 1, -2, -1]].reshape(len(images), -1, 3), 1)
    ink = np.abs(images - border[:, None, None]).mean(-1) > 50
    row, column = np.mgrid[:32, :32]
    mass = ink.sum((1, 2)) + 1e-6
    y, x = ((ink * axis).sum((1, 2)) / mass for axis in (row, column))
    radius = (
        np.hypot(row - y[:, None, None], column - x[:, None, None]) / np.sqrt(mass)[:, None, None]
    )
    shares = [
        (ink & (np.abs(radius - middle) < 0.05)).sum((1, 2)) / mass
        for middle in np.arange(0.05, 1.5, 0.1)
    ]
    assert accuracy(np.stack(shares, 1), labels, ridge=0.01) > 0.5


def test_unknown_task_names_the_known_ones():
    with pytest.raises(UserError, match=r"'sideways'.*upstream, downstream"):
        draw("sideways", 10, seed=0)


@pytest.mark.parametrize("count", [0, -5])
def test_a_count_below_one_is_an_error(count):
    with pytest.raises(UserError, match=rf"{count} images.*upstream, downstream"):
        draw("upstream", count, seed=0)
