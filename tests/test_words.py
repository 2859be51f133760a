"""Figures speak the language of the run, whatever fonts there are."""

import re

import numpy as np
import pytest
import yaml
from matplotlib.text import Text
from test_plots import some_predictions

from cifar_transfer.base.errors import UserError
from cifar_transfer.commands.figures import figures
from cifar_transfer.data.cifar import CLASSES
from cifar_transfer.results import gallery, plots, publish, words
from cifar_transfer.results.predictions import ImagePrediction
from cifar_transfer.results.words import language

X = np.arange(6.0) + 1
BY_STEP = ("train/loss", "train/acc_step", "val/loss_step", "val/acc_step")
CURVES = {name: plots.Curve(X, X.round(-1)) for name in (*plots.BY_EPOCH, *BY_STEP)}


@pytest.fixture
def fonts(monkeypatch):
    """Says which letters all fonts have, whatever is installed."""

    def have(letters):
        monkeypatch.setattr(words, "_letters", lambda path: frozenset(map(chr, letters)))
        words._families.cache_clear()

    yield have
    words._families.cache_clear()


def drawn(names):
    """The words of all figures, drawn with predictions for classes of these names."""
    shown = ImagePrediction(
        "1.png", np.zeros((3, 8, 8), np.uint8), [(names[0], 0.6), (names[1], 0.4)]
    )
    figures = list(publish.prediction_plots(some_predictions(names), "test").values())
    for frozen in ("backbone frozen", "partly frozen"):
        figures += [
            draw(CURVES, plots.Phases(frozen, [2, 3])) for draw in (plots.epochs, plots.iterations)
        ]
    figures += [plots.rates_by_stage(np.ones((1, 2)), ["7"]), gallery.gallery([shown], 30)]
    figures += [gallery.heated(shown, np.full((8, 8), share)) for share in (0, 1)]
    texts = [text.get_text() for figure in figures for text in figure.findobj(Text)]
    legends = [
        text
        for figure in figures
        for axes in figure.axes
        for text in axes.get_legend_handles_labels()[1]
    ]
    return "\n".join(texts + legends)


def test_every_word_is_chinese_and_names_are_if_they_are_cifar10s(fonts):
    fonts(range(0x10000))
    with language("zh", CLASSES):
        text = drawn(CLASSES)
    for wanted in (
        "训练准确率",
        "验证准确率",
        "测试准确率",
        "损失值",
        "置信度",
        "混淆矩阵",
        "飞机",
        "鸟类",
        "青蛙",
        "卡车",
    ):
        assert wanted in text
    assert not re.findall(r"[A-Za-z]{3,}", text.replace("1.png", ""))
    with language("zh", ["cat", "dog"]):
        text = drawn(["cat", "dog"])
    assert "cat" in text
    assert "猫" not in text
    assert "训练" not in drawn(CLASSES), "after it as before"


@pytest.mark.slow
def test_every_translation_is_used(fonts):
    fonts(range(0x10000))
    asked = set()
    with pytest.MonkeyPatch.context() as patch, language("zh", CLASSES):
        for module in (plots, publish, gallery, words):
            patch.setattr(
                module, "word", lambda text, **values: asked.add(text) or text.format(**values)
            )
        drawn([f"class {number}\U000f0000" for number in range(120)])
    elsewhere = {
        "test loss",
        "validation accuracy",
        "Training images as the network sees them, {size} pixels",
    }
    assert asked | elsewhere == words.CHINESE.keys() | {"F1", ""}


def test_without_a_font_figures_are_in_english_which_is_said_once(fonts, capsys):
    fonts(range(128))
    for _ in range(2):
        with language("zh", CLASSES):
            text = drawn(CLASSES)
    assert "training accuracy" in text
    assert "said cat" in text
    assert capsys.readouterr().err.splitlines() == [
        "Figures are in English: no font here has the letters of zh (Noto Sans CJK has)."
    ]


def test_figures_are_drawn_again_in_the_runs_language(fonts, tmp_path, monkeypatch):
    fonts(range(0x10000))
    predictions = some_predictions(["cat", "dog"])
    (tmp_path / "figures").mkdir()
    predictions.save(tmp_path / "figures" / "predictions-test.npz")
    found = []
    monkeypatch.setattr(
        plots, "save", lambda figure, path: found.extend(t.get_text() for t in figure.findobj(Text))
    )
    for name, wanted in (("en", "predicted"), ("zh", "预测类别")):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({"report": {"language": name}}))
        figures(str(tmp_path))
        assert wanted in found
        found.clear()
    (tmp_path / "config.yaml").write_text("report: 7")
    assert words.language_of(tmp_path) == words.language_of(tmp_path / "none") == "en"


def test_an_unknown_language_is_refused():
    with pytest.raises(UserError, match=r"^language is fr: take en or zh\.$"), language("fr"):
        pass
