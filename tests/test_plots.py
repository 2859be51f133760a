"""Figures: complete, readable in any script, and the same from what a run has kept."""

import itertools
import warnings

import numpy as np
import pytest
import torch
from conftest import quiet_trainer
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from torchmetrics.functional.classification import multiclass_calibration_error

from cifar_transfer import ShapesDataModule, TransferClassifier
from cifar_transfer.data.splits import Splits
from cifar_transfer.results import gallery, plots, run_figures
from cifar_transfer.results.plots import Curve, Phases, RunCurves
from cifar_transfer.results.predictions import ImagePrediction, Predictions
from cifar_transfer.results.words import lettering
from cifar_transfer.training.collect_predictions import CollectPredictions
from cifar_transfer.training.final_report import draw_curves
from cifar_transfer.training.metrics_file import MetricsFile
from cifar_transfer.training.report import augmented_images

NAMES = {
    "three": ["cat", "dog", "bird"],
    "ten long": [f"Parus caeruleus obscurus {number}" for number in range(10)],
    "ten Chinese": ["飞机", "汽车", "鸟", "猫", "鹿", "狗", "青蛙", "马", "船", "卡车"],
    "hundred": [f"class number {number}" for number in range(100)],
    "formula": ["$x", "a_b", "50%"],
    "without a font": ["\U000f0000", "\U000f0001 tail"],
}
NOTHING_FROZEN = Phases("backbone frozen", [])


def some_predictions(names, count=300, seed=0, temperature=1.0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(len(names), (count,), generator=generator)
    logits = torch.randn(count, len(names), generator=generator)
    logits[torch.arange(count), labels] += 2
    rows = torch.arange(12)
    images = torch.randint(0, 256, (12, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return Predictions(names, labels, logits, rows, images, temperature)


def without_images(names, labels, probabilities):
    no_images = torch.empty(0, 3, 1, 1, dtype=torch.uint8)
    return Predictions(names, labels, probabilities.log(), torch.arange(0), no_images)


def assert_nothing_is_cut_off(figure):
    """Check that all ink lies on the canvas, and that every letter has a glyph."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
    box = figure.get_tightbbox(canvas.get_renderer())
    width, height = figure.get_size_inches()
    assert box.x0 >= -0.02, box
    assert box.y0 >= -0.02, box
    assert box.x1 <= width + 0.02, (box, width)
    assert box.y1 <= height + 0.02, (box, height)


def shaded_until(axes):
    """Return where the shade of the first phase ends."""
    shade = axes.patches[0].get_extents()
    return shade.transformed(axes.transData.inverted()).x1


@pytest.mark.slow
@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_no_name_is_cut_off_or_boxed(names):
    figures = run_figures.prediction_figures(some_predictions(names, temperature=1.5), "test")
    for figure in figures.values():
        assert_nothing_is_cut_off(figure)


@pytest.mark.parametrize("count", [40, 3, 1])
def test_curves_are_whole(count):
    x = np.arange(count) + 1.0
    falling = Curve(x, np.exp(-x / 9))
    curves = RunCurves(
        step_loss=falling,
        step_accuracy=falling,
        step_val_loss=falling,
        step_val_accuracy=falling,
        train_loss=falling,
        train_accuracy=falling,
        val_loss=falling,
        val_accuracy=falling,
        learning_rate=Curve(x, np.where(x <= 5, 1e-3, 1e-4)),
    )
    phases = Phases("backbone frozen", [5, 10])
    assert_nothing_is_cut_off(plots.curves_by_epoch(curves, phases))
    assert_nothing_is_cut_off(plots.curves_by_step(curves, phases))


def test_epochs_shade_the_frozen_ones_and_mark_changed_rates():
    x = np.arange(10.0) + 1
    rate = Curve(x, np.repeat([1.0, 0.5, 0.25], [3, 4, 3]))
    curves = RunCurves(val_loss=Curve(x, x), learning_rate=rate)
    axes = plots.curves_by_epoch(curves, Phases("backbone frozen", [3])).axes[0]
    assert shaded_until(axes) == pytest.approx(3.5)
    marked = [line.get_xdata()[0] for line in axes.lines[1:]]
    assert marked == [7.5], "the other change is where the shade ends"


def test_a_rate_that_always_changes_is_not_marked():
    x = np.arange(10.0) + 1
    curves = RunCurves(val_loss=Curve(x, x), learning_rate=Curve(x, 1 - x / 10))
    axes = plots.curves_by_epoch(curves, NOTHING_FROZEN).axes[0]
    assert len(axes.lines) == 1
    axes = plots.curves_by_epoch(curves, Phases("backbone frozen", [3, 5])).axes[0]
    assert [line.get_xdata()[0] for line in axes.lines[1:]] == [5.5], "the second phase"


def test_the_smoothed_loss_begins_with_the_loss():
    smoothed = plots.smooth(np.array([4.0, *[2.0] * 40]))
    assert smoothed[0] == 4
    assert np.all((smoothed[1:] > 2) & (smoothed[1:] < 4))
    assert plots.smooth(np.full(50, 3.0)) == pytest.approx(3)
    assert plots.smooth(np.array([4.0, 2.0, 3.0])).tolist() == [4, 2, 3], "too few"


def test_confusion_counts_and_calibration():
    probabilities = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]])
    predictions = without_images(["a", "b"], torch.tensor([0, 1, 1, 1]), probabilities)
    assert predictions.confusion().tolist() == [[1, 0], [2, 1]]
    # Four predictions, each alone in its bin: |1 - 0.9|, |0 - 0.8|, |1 - 0.7|, |0 - 0.6|.
    error = predictions.confidence_bins(15).calibration_error
    assert error == pytest.approx((0.1 + 0.8 + 0.3 + 0.6) / 4)


@pytest.mark.parametrize("num_bins", [10, 15])
def test_the_calibration_error_is_that_of_torchmetrics(num_bins):
    predictions = some_predictions(["a", "b", "c"], count=2000)
    expected = multiclass_calibration_error(
        predictions.probabilities, predictions.labels, 3, num_bins
    )
    error = predictions.confidence_bins(num_bins).calibration_error
    assert error == pytest.approx(float(expected), abs=1e-6)


def test_predictions_survive_saving(tmp_path):
    predictions = some_predictions(["猫", "dog", "a"], temperature=1.3)
    predictions.save(tmp_path / "predictions-test.npz")
    loaded = Predictions.load(tmp_path / "predictions-test.npz")
    assert loaded.names == predictions.names
    assert torch.equal(loaded.labels, predictions.labels)
    assert torch.equal(loaded.images, predictions.images)
    assert torch.equal(loaded.probabilities, predictions.probabilities)
    assert loaded.temperature == 1.3
    assert [path.name for path in tmp_path.iterdir()] == ["predictions-test.npz"]


def test_saved_predictions_have_the_calibration_error_of_the_exact_ones(tmp_path):
    """Confidences just below the edge of a bin would be rounded into the next one."""
    confidences = torch.full((1000,), 14 / 15 - 1e-5)
    confidences[:500] = 14 / 15 + 0.06
    probabilities = torch.stack((confidences, 1 - confidences), 1)
    labels = (torch.arange(1000) % 20 < 8).long()
    labels[:500] = 0
    predictions = without_images(["a", "b"], labels, probabilities)
    predictions.save(tmp_path / "p.npz")
    loaded = Predictions.load(tmp_path / "p.npz")
    exact = predictions.confidence_bins(15).calibration_error
    assert loaded.confidence_bins(15).calibration_error == exact
    assert torch.equal(loaded.probabilities, predictions.probabilities)
    torch.testing.assert_close(loaded.probabilities, probabilities, atol=1e-6, rtol=0)


def test_augmented_images_are_shown_at_the_networks_size_and_disturb_no_draw(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = ShapesDataModule(train_images=60, test_images=20)
    data.setup()
    random_state = torch.get_rng_state()
    images, shares = augmented_images(data, 48)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert images.shape == (32, 3, 48, 48)
    figure = run_figures.augmented_figure(images, shares, data.class_names)
    assert "48 x 48" in figure.get_suptitle()
    assert figure.axes[0].images[0].get_array().shape == (48, 48, 3)
    (path,) = run_figures.save_figures({"augmented": figure}, tmp_path / "figures")
    with Image.open(path) as picture:
        assert picture.width > 600


def test_predictions_are_collected_in_the_order_of_the_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = ShapesDataModule(train_images=60, test_images=50)
    model = TransferClassifier("shufflenet_v2_x0_5", "none", class_names=data.class_names)
    collected = CollectPredictions()
    quiet_trainer(callbacks=[collected]).test(model, data, verbose=False)
    predictions = collected.predictions
    images, labels = data.images["test"].__getitems__(range(50))
    assert torch.equal(predictions.labels, labels)
    with torch.no_grad():
        expected = model.eval()(images / 255).softmax(1)
    torch.testing.assert_close(predictions.probabilities, expected, atol=1e-4, rtol=0)
    mistakes = predictions.rows[~predictions.correct[predictions.rows]]
    confidences = predictions.confidences[mistakes]
    assert confidences.diff().le(0).all(), "the most confident mistakes first"
    assert torch.equal(predictions.images, images[predictions.rows])


def test_markup_and_long_names_are_drawn_as_they_are():
    names = [
        "<img src=x onerror=alert(1)>",
        r"$x^2_{\frac",
        r"a$b$ \alpha",
        "100%s %(x)d {0}",
        "`ls` *b* [a](b)",
        "x" * 255,
    ]
    figures = run_figures.prediction_figures(some_predictions(names), "test")
    for figure in figures.values():
        assert_nothing_is_cut_off(figure)
    letters = lettering(names)
    assert [letters.text(name).replace(r"\$", "$") for name in names] == names
    labels = figures["test-classes"].axes[0].get_yticklabels()
    drawn = [label.get_text().replace(r"\$", "$") for label in labels]
    assert sorted(drawn) == sorted([*names[:-1], "x" * 39 + "…"])


def test_the_note_on_letters_fits_below_the_narrowest_figures():
    pixels = np.zeros((3, 8, 8), np.uint8)
    shown = ImagePrediction("a.png", pixels, [("\U000f0000", 1.0)])
    for figure in (
        gallery.gallery([shown], 1),
        gallery.heated(shown, np.zeros((8, 8))),
        plots.grid(pixels[None], [["\U000f0000"]], "heading"),
    ):
        assert "apt install" in figure.get_supxlabel()
        assert_nothing_is_cut_off(figure)


def test_curves_are_in_order_of_steps_and_the_later_of_two_values_counts(tmp_path):
    file = MetricsFile(tmp_path)
    for step, loss in ((0, 6.0), (1, 9.0), (3, 3.0), (2, 4.0), (1, 5.0), (4, 2.0), (5, 1.0)):
        file.add(1, step, {"train/loss": loss})
    file.flush()
    line, _ = draw_curves(tmp_path)["iterations"].axes[0].lines
    assert line.get_xdata().tolist() == [1, 2, 3, 4, 5, 6]
    assert line.get_ydata().tolist() == [6, 5, 4, 3, 2, 1]


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


def write_metrics_of_five_epochs(run):
    """Write the curves of a run that trains its head, then another stage, then all."""
    file = MetricsFile(run)
    for epoch, trainable in enumerate([10, 10, 30, 30, 50], 1):
        for step in range(6 * epoch - 6, 6 * epoch):
            file.add(epoch, step, {"train/loss": 1.0, "train/acc_step": 0.5})
        file.add(epoch, step, {"val/acc_step": 0.5})
        figures = {
            "stages/stem": float(trainable >= 50),
            "stages/stage": float(trainable >= 30),
            "stages/head": 1.0,
            "trainable_parameters": trainable,
            "lr": 1.0,
            "val/acc": 0.5,
        }
        file.add(epoch, step, figures)
    file.flush()


def test_the_first_phase_is_shaded_also_by_iteration_and_the_test_named_where_it_validates(
    tmp_path,
):
    names = {"train": ["train/a/1"], "val": ["test/a/1"], "test": ["test/a/1"]}
    Splits(names, rows={}, val_source="test", sources={}).write(tmp_path)
    write_metrics_of_five_epochs(tmp_path)
    figures = draw_curves(tmp_path)
    for name, begins in (("epochs", (2.5, 4.5)), ("iterations", (12.5, 24.5))):
        axes = figures[name].axes[1]
        handles, labels = axes.get_legend_handles_labels()
        by_label = dict(zip(labels, handles, strict=True))
        assert "backbone frozen" in by_label
        assert shaded_until(axes) == pytest.approx(begins[0])
        assert by_label["more unfrozen"].get_xdata()[0] == begins[1]
        assert "test accuracy" in by_label
    assert by_label["test accuracy"].get_xdata().tolist() == [6, 12, 18, 24, 30]


@pytest.mark.parametrize(
    ("stem", "head", "label"), [(0.0, 1.0, "backbone frozen"), (0.5, 0.0, "partly frozen")]
)
def test_what_never_trains_is_shaded_to_the_end(stem, head, label):
    x = np.arange(4.0) + 1
    rates = {"stem": np.full(4, stem), "head": np.full(4, head)}
    curves = RunCurves(trainable_parameters=Curve(x, np.full(4, 10.0)), stage_rates=rates)
    assert run_figures.frozen_phases(curves) == Phases(label, [4])


def test_nothing_is_shaded_where_everything_trains():
    x = np.arange(4.0) + 1
    rates = {"stem": np.ones(4), "head": np.ones(4)}
    curves = RunCurves(trainable_parameters=Curve(x, np.full(4, 10.0)), stage_rates=rates)
    assert run_figures.frozen_phases(curves).beginnings == []


@pytest.mark.slow
@pytest.mark.parametrize("draw", [plots.confusion, plots.per_class])
def test_many_classes_with_long_names_are_drawn_in_full(draw):
    """The label of the axis is within the figure, and headings do not overlap."""
    names = [f"species_with_a_long_latin_name_{number:03d}" for number in range(120)]
    figure = draw(some_predictions(names, count=360))
    figure.draw_without_rendering()
    for axes in figure.axes:
        label = axes.xaxis.label.get_window_extent()
        assert label.y0 >= figure.bbox.y0
        headings = [text for text in axes.texts if text.get_weight() == "bold"]
        boxes = [heading.get_window_extent() for heading in headings]
        for left, right in itertools.pairwise(boxes):
            assert left.x1 < right.x0
