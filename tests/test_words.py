"""Figures speak the language of the run, whatever fonts there are."""

import re

import numpy as np
import pytest
import yaml
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text
from test_plots import some_predictions

from cifar_transfer.base.errors import UserError
from cifar_transfer.commands.figures import figures
from cifar_transfer.results import fonts, gallery, plots, run_figures, words
from cifar_transfer.results.plots import Curve, Phases, RunCurves
from cifar_transfer.results.predictions import ImagePrediction
from cifar_transfer.results.words import language, lettering

CIFAR10 = tuple(words.CHINESE.cifar10_classes)
X = np.arange(6.0) + 1
CURVE = Curve(X, X.round(-1))
CURVES = RunCurves(
    step_loss=CURVE,
    step_accuracy=CURVE,
    step_val_loss=CURVE,
    step_val_accuracy=CURVE,
    train_loss=CURVE,
    train_accuracy=CURVE,
    val_loss=CURVE,
    val_accuracy=CURVE,
    learning_rate=CURVE,
)
PRIVATE_USE = "\U000f0000"  # a letter that no font has


@pytest.fixture
def fonts_have(monkeypatch):
    """Return a function that sets which letters all fonts have, whatever is installed."""

    def have(codes):
        letters = set(map(chr, codes))
        monkeypatch.setattr(words, "missing_letters", lambda text: set(text) - letters)
        words._can_be_drawn.cache_clear()

    yield have
    words._can_be_drawn.cache_clear()


def text_of(figure):
    return [text.get_text() for text in figure.findobj(Text)]


def drawn(names):
    """Return the words of all figures, drawn with predictions for classes of these names."""
    classes = [(names[0], 0.6), (names[1], 0.4)]
    shown = ImagePrediction("1.png", np.zeros((3, 8, 8), np.uint8), classes)
    predictions = some_predictions(names)
    all_figures = list(run_figures.prediction_figures(predictions, "test").values())
    all_figures.append(plots.reliability(predictions.at_temperature(1.5)))
    all_figures.append(plots.coverage(predictions))
    for frozen in ("backbone frozen", "partly frozen"):
        phases = Phases(frozen, [2, 3])
        all_figures.append(plots.curves_by_epoch(CURVES, phases))
        all_figures.append(plots.curves_by_step(CURVES, phases))
    all_figures.append(plots.rates_by_stage(np.ones((1, 2)), ["7"]))
    all_figures.append(gallery.gallery([shown], 30))
    all_figures.append(gallery.heated(shown, np.zeros((8, 8))))
    all_figures.append(gallery.heated(shown, np.ones((8, 8))))
    texts = []
    for figure in all_figures:
        texts += text_of(figure)
        for axes in figure.axes:
            texts += axes.get_legend_handles_labels()[1]
    return "\n".join(texts)


@pytest.mark.slow
def test_every_word_is_chinese_and_names_are_if_they_are_cifar10s(fonts_have):
    fonts_have(range(0x10000))
    with language("zh", CIFAR10):
        text = drawn(CIFAR10)
    for expected in (
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
        assert expected in text
    assert not re.findall(r"[A-Za-z]{3,}", text.replace("1.png", ""))
    with language("zh", ["cat", "dog"]):
        text = drawn(["cat", "dog"])
    assert "cat" in text
    assert "猫" not in text
    assert "训练" not in drawn(CIFAR10), "after it as before"


@pytest.mark.slow
def test_every_translation_is_used(fonts_have):
    fonts_have(range(0x10000))
    asked = set()

    def record(text, **values):
        asked.add(text)
        return text.format(**values)

    with pytest.MonkeyPatch.context() as patch, language("zh", CIFAR10):
        for module in (plots, run_figures, gallery, words):
            patch.setattr(module, "word", record)
        drawn([f"class {number}{PRIVATE_USE}" for number in range(120)])
    elsewhere = {
        "test loss",
        "validation accuracy",
        "Training images as the network sees them, {size} pixels",
    }
    assert asked | elsewhere == words.CHINESE.words.keys() | {""}


@pytest.mark.slow
def test_without_a_font_figures_are_in_english_which_is_said_once(fonts_have, capsys):
    fonts_have(range(128))
    for _ in range(2):
        with language("zh", CIFAR10):
            text = drawn(CIFAR10)
    assert "training accuracy" in text
    assert "said cat" in text
    assert capsys.readouterr().err.splitlines() == [
        "Figures are in English: no font here has the letters of zh (apt install fonts-noto-cjk)."
    ]


def test_figures_are_drawn_again_in_the_runs_language(fonts_have, tmp_path, monkeypatch):
    fonts_have(range(0x10000))
    (tmp_path / "figures").mkdir()
    some_predictions(["cat", "dog"]).save(tmp_path / "figures" / "predictions-test.npz")
    texts = []
    monkeypatch.setattr(plots, "save", lambda figure, path: texts.extend(text_of(figure)))
    for name, expected in (("en", "predicted"), ("zh", "预测类别")):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({"report": {"language": name}}))
        figures(str(tmp_path))
        assert expected in texts
        texts.clear()


def test_the_language_of_a_run_without_one_is_english(tmp_path):
    assert words.language_of(tmp_path / "none") == "en"
    (tmp_path / "config.yaml").write_text("report: 7")
    assert words.language_of(tmp_path) == "en"


def test_an_unknown_language_is_refused():
    with pytest.raises(UserError, match=r"^language is fr: take en or zh\.$"), language("fr"):
        pass


@pytest.fixture
def of_another_font():
    """Return three letters that of matplotlib's own fonts STIXGeneral has, not DejaVu Sans."""
    stix = FT2Font(font_manager.findfont("STIXGeneral")).get_charmap()
    dejavu = FT2Font(font_manager.findfont(fonts.DEFAULT_FAMILY)).get_charmap()
    return "".join(chr(code) for code in sorted(stix.keys() - dejavu.keys())[:3])


def test_a_name_is_drawn_with_the_font_that_has_its_letters_or_with_their_numbers(of_another_font):
    letters = lettering(["cat", of_another_font])
    assert letters.text("cat") == "cat"
    assert letters.text(of_another_font) == of_another_font
    assert letters.note == ""
    assert letters.families[0] == fonts.DEFAULT_FAMILY
    assert "STIXGeneral" in letters.families
    letters = lettering(["cat", f"{PRIVATE_USE}é"])
    assert letters.text("cat") == "cat"
    assert letters.text(f"{PRIVATE_USE}é") == r"\U000f0000é"
    assert "No font has some of the letters" in letters.note
    assert "apt install" in letters.note


def test_a_font_that_was_installed_after_matplotlibs_list_was_made_is_found(
    monkeypatch, of_another_font
):
    manager = font_manager.fontManager
    path = font_manager.findfont("STIXGeneral")
    listed = [font for font in manager.ttflist if font.name == fonts.DEFAULT_FAMILY]
    monkeypatch.setattr(manager, "ttflist", listed)
    fonts._add_new_fonts.cache_clear()
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: ["/nowhere.ttf"])
    assert fonts.missing_letters(of_another_font) == set(of_another_font)
    fonts._add_new_fonts.cache_clear()
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: ["/nowhere.ttf", str(path)])
    assert fonts.missing_letters(of_another_font) == set()
    assert fonts.installed_families() == [fonts.DEFAULT_FAMILY, "STIXGeneral"]
    fonts._add_new_fonts.cache_clear()
