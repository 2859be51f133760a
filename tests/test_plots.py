"""Figures: complete, readable in any script, and the same from what a run has kept."""

import warnings

import numpy as np
import pytest
import torch
from conftest import quiet_trainer
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.ft2font import FT2Font
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from cifar_transfer import ShapesDataModule
from cifar_transfer.data import splits
from cifar_transfer.results import gallery, plots, publish
from cifar_transfer.results.collect import CollectPredictions
from cifar_transfer.results.predictions import ImagePrediction, Predictions
from cifar_transfer.results.words import BASE, lettering

NAMES = {
    "three": ["cat", "dog", "bird"],
    "ten long": [f"Parus caeruleus obscurus {number}" for number in range(10)],
    "ten Chinese": ["飞机", "汽车", "鸟", "猫", "鹿", "狗", "青蛙", "马", "船", "卡车"],
    "hundred": [f"class number {number}" for number in range(100)],
    "formula": ["$x", "a_b", "50%"],
}


def some_predictions(names, count=300, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(len(names), (count,), generator=generator)
    logits = torch.randn(count, len(names), generator=generator)
    logits[torch.arange(count), labels] += 2
    rows = torch.arange(12)
    images = torch.randint(0, 256, (12, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return Predictions(names, labels, logits.softmax(1), rows, images)


def assert_nothing_is_cut_off(figure):
    """All ink lies on the canvas, and every letter has a glyph."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
    box, (width, height) = figure.get_tightbbox(canvas.get_renderer()), figure.get_size_inches()
    assert box.x0 >= -0.02, box
    assert box.y0 >= -0.02, box
    assert box.x1 <= width + 0.02, (box, width)
    assert box.y1 <= height + 0.02, (box, height)


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_no_name_is_cut_off_or_boxed(names):
    for figure in publish.prediction_plots(some_predictions(names), "test").values():
        assert_nothing_is_cut_off(figure)


def test_curves_are_whole():
    x = np.arange(40.0) + 1
    curve = {
        tag: plots.Curve(x, np.exp(-x / 9))
        for tag in ("train/loss_epoch", "val/loss", "train/acc", "val/acc")
    }
    curve |= {"lr": plots.Curve(x, np.where(x <= 5, 1e-3, 1e-4))}
    curve |= {
        name: curve["val/acc"]
        for name in ("train/loss", "train/acc_step", "val/loss_step", "val/acc_step")
    }
    for draw in (plots.epochs, plots.iterations):
        for count in (40, 3, 1):
            few = {name: plots.Curve(x[:count], y[:count]) for name, (x, y) in curve.items()}
            assert_nothing_is_cut_off(draw(few, plots.Phases("backbone frozen", [5, 10])))


def test_epochs_shade_the_frozen_ones_and_mark_the_rates_steps():
    x = np.arange(10.0) + 1
    curves = {
        "val/loss": plots.Curve(x, x),
        "lr": plots.Curve(x, np.repeat([1.0, 0.5, 0.25], [3, 4, 3])),
    }
    axes = plots.epochs(curves, plots.Phases("backbone frozen", [3])).axes[0]
    assert axes.patches[0].get_extents().transformed(
        axes.transData.inverted()
    ).intervalx == pytest.approx([0.5, 3.5])
    assert [line.get_xdata()[0] for line in axes.lines[1:]] == [7.5], (
        "the other step is the end of what is shaded"
    )
    curves["lr"] = plots.Curve(x, 1 - x / 10)
    assert len(plots.epochs(curves, plots.Phases("", [])).axes[0].lines) == 1, (
        "a decay has no steps"
    )
    assert [
        line.get_xdata()[0]
        for line in plots.epochs(curves, plots.Phases("", [3, 5])).axes[0].lines[1:]
    ] == [5.5]


def test_the_smoothed_loss_begins_with_the_loss():
    smoothed = plots.smooth(np.array([4.0, *[2.0] * 40]))
    assert smoothed[0] == 4
    assert all(2 < value < 4 for value in smoothed[1:])
    assert plots.smooth(np.full(50, 3.0)) == pytest.approx(3)
    assert plots.smooth(np.array([4.0, 2.0, 3.0])).tolist() == [4, 2, 3], "too few"


def test_a_name_is_drawn_with_the_font_that_has_its_letters_or_in_latin_letters():
    known = [
        font
        for font in font_manager.fontManager.ttflist
        if font.name == "STIXGeneral" and font.weight == 400
    ]
    letters = set(map(chr, FT2Font(known[0].fname).get_charmap()))
    letters -= set(map(chr, FT2Font(font_manager.findfont(BASE)).get_charmap()))
    rare = "".join(sorted(letters)[:3])
    found = lettering(["cat", rare])
    assert found.names == {"cat": "cat", rare: rare}
    assert found.note == ""
    assert len(found.families) > 1
    nobodys = "\U000e0101\U000f0000"  # private use
    found = lettering(["cat", nobodys + "é"])
    assert list(found.names.values()) == ["cat", "e"]
    assert "no font" in found.note


def test_confusion_counts_and_calibration():
    sure = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]])
    predictions = Predictions(
        ["a", "b"], torch.tensor([0, 1, 1, 1]), sure, torch.arange(0), torch.empty(0, 3, 1, 1)
    )
    assert predictions.confusion().tolist() == [[1, 0], [2, 1]]
    # Four predictions, each alone in its bin: |1 - 0.9|, |0 - 0.8|, |1 - 0.7|, |0 - 0.6|.
    assert predictions.calibration_error(15) == pytest.approx((0.1 + 0.8 + 0.3 + 0.6) / 4)


def test_predictions_survive_saving(tmp_path):
    predictions = some_predictions(["猫", "dog", "a"])
    predictions.save(tmp_path / "predictions-test.npz")
    loaded = Predictions.load(tmp_path / "predictions-test.npz")
    assert loaded.names == predictions.names
    assert torch.equal(loaded.labels, predictions.labels)
    assert torch.equal(loaded.images, predictions.images)
    torch.testing.assert_close(loaded.probabilities, predictions.probabilities, atol=1e-3, rtol=0)
    assert [path.name for path in tmp_path.iterdir()] == ["predictions-test.npz"]


def test_rounding_changes_no_prediction(tmp_path):
    close = 0.5 + torch.rand(1000, 2, generator=torch.Generator().manual_seed(0)) * 1e-4
    close[:10] = torch.tensor([0.0, 1.0])
    labels = torch.zeros(1000, dtype=torch.long)
    predictions = Predictions(
        ["a", "b"], labels, close, torch.arange(0), torch.empty(0, 3, 1, 1, dtype=torch.uint8)
    )
    predictions.save(tmp_path / "p.npz")
    kept = Predictions.load(tmp_path / "p.npz")
    assert torch.equal(kept.predicted, predictions.predicted)
    assert kept.probabilities.max() <= 1
    torch.testing.assert_close(kept.probabilities, close, atol=1e-3, rtol=0)


def test_augmented_images_are_shown_at_the_networks_size_and_disturb_no_draw(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = ShapesDataModule(train_images=60, test_images=20)
    data.setup()
    before = torch.get_rng_state()
    figure = publish.augmented(data, 48)
    assert torch.equal(torch.get_rng_state(), before)
    assert "48 x 48" in figure.get_suptitle()
    assert figure.axes[0].images[0].get_array().shape == (48, 48, 3)
    (path,) = publish.save({"augmented": figure}, tmp_path / "figures")
    with Image.open(path) as picture:
        assert picture.width > 600


def test_features_from_all_over_the_split_are_kept_on_request_with_their_images(
    tmp_path, monkeypatch
):
    from cifar_transfer import TransferClassifier

    monkeypatch.chdir(tmp_path)
    data = ShapesDataModule(train_images=60, test_images=50)
    model = TransferClassifier("shufflenet_v2_x0_5", "none", class_names=data.class_names)
    model.mirrored = True  # whose features are not those
    collected = CollectPredictions(features=30)
    trainer = quiet_trainer(callbacks=[collected])
    trainer.test(model, data, verbose=False)
    images, labels = data.images["test"].__getitems__(range(50))
    assert torch.equal(collected.predictions.labels, labels)
    with torch.no_grad():
        logits = model.eval()(images / 255)
        expected = model.network.fc(collected.features)
    torch.testing.assert_close(
        logits.softmax(1), collected.predictions.probabilities, atol=1e-4, rtol=0
    )
    torch.testing.assert_close(logits[::2], expected, atol=1e-4, rtol=0)  # at most 30 of 50
    assert torch.equal(collected.thumbnails, images[::2])
    assert torch.equal(collected.classes, labels[::2])
    kept = collected.predictions
    worst = kept.rows[~kept.correct[kept.rows]]
    assert kept.confidences[worst].diff().le(0).all(), "the most confident mistakes first"
    assert torch.equal(kept.images, images[kept.rows])


def test_markup_and_long_names_are_drawn_as_they_are():
    names = [
        "<img src=x onerror=alert(1)>",
        r"$x^2_{\frac",
        r"a$b$ \alpha",
        "100%s %(x)d {0}",
        "`ls` *b* [a](b)",
        "x" * 255,
    ]
    for figure in publish.prediction_plots(some_predictions(names), "test").values():
        assert_nothing_is_cut_off(figure)
    letters = lettering(names)
    assert [letters.names[name].replace(r"\$", "$") for name in names] == names
    axes = publish.prediction_plots(some_predictions(names), "test")["test-classes"].axes[0]
    drawn = [label.get_text().replace(r"\$", "$") for label in axes.get_yticklabels()]
    assert sorted(drawn) == sorted([*names[:-1], "x" * 39 + "…"])


def test_curves_are_in_order_of_steps_though_the_clock_was_set_back(tmp_path):
    for number, steps in ((2, range(3)), (1, range(3, 6))):
        with SummaryWriter(str(tmp_path)) as board:
            for step in steps:
                board.add_scalar("train/loss", 6.0 - step, step)
        (written,) = tmp_path.glob("events.*.*.*.*")
        written.rename(tmp_path / f"events.out.tfevents.{number}")
    (line, _) = publish.curves(tmp_path)["iterations"].axes[0].lines
    assert line.get_xdata().tolist() == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("count", "shape"),
    [(1, (1, 1)), (8, (1, 8)), (9, (1, 8)), (20, (4, 5)), (31, (5, 6)), (32, (4, 8))],
)
def test_a_grid_has_no_empty_places(count, shape):
    figure = plots.grid(np.zeros((count, 3, 4, 4), np.uint8), [("a",)] * count, "heading")
    assert figure.axes[0].get_gridspec().get_geometry() == shape
    assert all(axes.images for axes in figure.axes)
    assert_nothing_is_cut_off(figure)


@pytest.mark.parametrize(
    ("count", "columns"), [(1, 1), (2, 2), (3, 3), (4, 2), (5, 1), (9, 3), (11, 3), (24, 3)]
)
def test_a_few_images_fill_their_gallery(count, columns):
    shown = [ImagePrediction("a.png", np.zeros((3, 4, 4), np.uint8), [("a", 1.0)])] * count
    assert gallery.gallery(shown, count).axes[0].get_gridspec().ncols == 2 * columns


def test_the_first_phase_is_shaded_also_by_iteration_and_the_test_named_where_it_validates(
    tmp_path,
):
    splits.write(tmp_path, {"train": ["train/a/1"], "val": ["test/a/1"], "test": ["test/a/1"]})
    trainable = [10, 10, 30, 30, 50]
    with SummaryWriter(str(tmp_path)) as board:
        for epoch, number in enumerate(trainable, 1):
            for stage, begins in (("stem", 50), ("stage", 30), ("head", 10)):
                board.add_scalar(f"stages/{stage}", float(number >= begins), epoch)
            for name, value in (
                ("trainable_parameters", number),
                ("lr", 1),
                ("steps", 6 * epoch),
                ("accuracy/val", 0.5),
            ):
                board.add_scalar(name, value, epoch)
            board.add_scalar("accuracy/val_step", 0.5, 6 * epoch - 1)
            for step in range(6 * epoch - 6, 6 * epoch):
                board.add_scalar("loss/train_step", 1, step)
                board.add_scalar("accuracy/train_step", 0.5, step)
    drawn = publish.curves(tmp_path)
    for name, begins in (("epochs", (2.5, 4.5)), ("iterations", (12.5, 24.5))):
        axes = drawn[name].axes[1]
        labels = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
        assert labels["backbone frozen"].get_extents().transformed(
            axes.transData.inverted()
        ).x1 == pytest.approx(begins[0])
        assert labels["more unfrozen"].get_xdata()[0] == begins[1]
        assert "test accuracy" in labels
    assert labels["test accuracy"].get_xdata().tolist() == [6, 12, 18, 24, 30]
