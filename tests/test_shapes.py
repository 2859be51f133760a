"""Drawn shapes: the same for the same arguments, in balanced classes that only outlines tell."""

from itertools import product

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
    images, labels = draw("downstream", 40, seed=7)
    same_images, same_labels = draw("downstream", 40, seed=7)
    assert np.array_equal(images, same_images)
    assert np.array_equal(labels, same_labels)


def test_no_image_is_drawn_twice():
    contents = set()
    for task, seed in product(TASKS, (0, 1)):
        images, _ = draw(task, 60, seed)
        contents.update(image.tobytes() for image in images)
    assert len(contents) == 240


@pytest.mark.parametrize("task", TASKS)
def test_every_shape_stands_out_from_its_background(task):
    """Of a typical image of each class 8 to 50 % of the pixels differ clearly from the border."""
    images, labels = draw(task, 500, seed=0)
    light = images.mean(-1)
    border = np.median(
        np.concatenate([light[:, :2].reshape(500, -1), light[:, -2:].reshape(500, -1)], 1), 1
    )
    inked = (np.abs(light - border[:, None, None]) > 50).mean((1, 2))
    for label, name in enumerate(TASKS[task]):
        assert 0.08 < np.median(inked[labels == label]) < 0.5, name


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_pixels_are_useless_to_a_linear_classifier_and_the_outline_is_not(task):
    """Ridge regression to one-hot labels fails on pixels; it succeeds on an invariant of rotation.

    The invariant is a histogram of the distances of the ink from its centre of mass, in units of
    its own size.
    """

    def accuracy(features, labels, ridge):
        features = np.concatenate([features, np.ones((len(features), 1))], 1)
        train = slice(0, 1800)
        test = slice(1800, None)
        a = features[train]
        b = np.eye(10)[labels[train]]
        # The dual form, because there are fewer images than pixels.
        weights = a.T @ np.linalg.solve(a @ a.T + ridge * np.eye(len(a)), b)
        return ((features[test] @ weights).argmax(1) == labels[test]).mean()

    images, labels = draw(task, 3000, seed=0)
    pixels = images.reshape(len(images), -1) / 255 - 0.5
    assert accuracy(pixels, labels, ridge=100.0) < 0.22

    border = np.median(images[:, [0, 1, -2, -1]].reshape(len(images), -1, 3), 1)
    ink = np.abs(images - border[:, None, None]).mean(-1) > 50
    row, column = np.mgrid[:32, :32]
    mass = ink.sum((1, 2)) + 1e-6
    y = (ink * row).sum((1, 2)) / mass
    x = (ink * column).sum((1, 2)) / mass
    distance = np.hypot(row - y[:, None, None], column - x[:, None, None])
    radius = distance / np.sqrt(mass)[:, None, None]
    shares = []
    for middle in np.arange(0.05, 1.5, 0.1):
        shares.append((ink & (np.abs(radius - middle) < 0.05)).sum((1, 2)) / mass)
    assert accuracy(np.stack(shares, 1), labels, ridge=0.01) > 0.5


def test_unknown_task_names_the_known_ones():
    with pytest.raises(UserError, match=r"'sideways'.*upstream, downstream"):
        draw("sideways", 10, seed=0)


@pytest.mark.parametrize("count", [0, -5])
def test_a_count_below_one_is_an_error(count):
    with pytest.raises(UserError, match=rf"{count} images.*upstream, downstream"):
        draw("upstream", count, seed=0)
