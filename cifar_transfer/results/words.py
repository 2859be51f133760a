"""Words on figures, in the language of a run, and names of any script.

Drawing functions write their English words as `word("...")`, which translates them within
`language("zh")`. Names that users have given pass through `lettering`, so that no letter is drawn
as an empty box.
"""

import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from matplotlib import rc_context

from cifar_transfer.base.errors import check
from cifar_transfer.base.files import CONFIG
from cifar_transfer.base.text import printable
from cifar_transfer.base.untrusted import read_yaml
from cifar_transfer.results.fonts import DEFAULT_FAMILY, installed_families, missing_letters

Language = Literal["en", "zh"]


@dataclass(frozen=True)
class Vocabulary:
    """Translations from English; what is missing stays English."""

    words: Mapping[str, str]
    cifar10_classes: Mapping[str, str]


ENGLISH = Vocabulary(words={}, cifar10_classes={})
CHINESE = Vocabulary(
    words={
        "epoch": "轮次",
        "iteration": "迭代次数",
        "loss": "损失值",
        "accuracy": "准确率",
        "accuracy (%)": "准确率 (%)",
        "training loss": "训练损失值",
        "validation loss": "验证损失值",
        "test loss": "测试损失值",
        "training accuracy": "训练准确率",
        "validation accuracy": "验证准确率",
        "test accuracy": "测试准确率",
        "one batch": "单个批次",
        "backbone frozen": "骨干冻结",
        "partly frozen": "部分冻结",
        "more unfrozen": "继续解冻",
        "learning rate changed": "学习率改变",
        "Learning rate by stage at the end of each epoch (grey: 0)": (
            "各轮结束时各阶段的学习率 (灰色: 0)"
        ),
        "Confusion matrix: {score} {value:.2%} of {count:,} images": (
            "混淆矩阵: {score} {value:.2%} ({count:,} 张图像)"
        ),
        "The {shown} of {all:,} classes with the most mistakes": (
            "{all:,} 个类别中错误最多的 {shown} 个"
        ),
        "The {shown} of {all:,} classes with the lowest F1": (
            "{all:,} 个类别中 F1 最低的 {shown} 个"
        ),
        "number of images": "图像数",
        "% of the class": "占该类别的 %",
        "predicted": "预测类别",
        "true": "真实类别",
        "precision": "精确率",
        "recall": "召回率",
        "images": "图像数",
        "confidence": "置信度",
        "expected calibration error {error:.1%}": "期望校准误差 {error:.1%}",
        "temperature {value:.2f}": "温度 {value:.2f}",
        "without temperature": "未校准",
        "Answering where the confidence reaches a threshold": "仅在置信度达到阈值时作答",
        "orange: {thresholds}, and all": "橙色: {thresholds}, 以及全部",
        "share of the images that is answered (%)": "作答图像的比例 (%)",
        "accuracy of the answers (%)": "作答的准确率 (%)",
        "The most confident mistakes": "置信度最高的错误",
        "Correct": "预测正确",
        "is {name}": "真实: {name}",
        "said {name}": "预测: {name}",
        "{share:.1%} sure": "置信度 {share:.1%}",
        "Training images as the network sees them, {size} pixels": (
            "网络所见的训练图像, {size} 像素"
        ),
        "The first {shown} of {all:,} images": "{all:,} 张图像中的前 {shown} 张",
        "what speaks for it": "支持该类别之处",
        "nothing speaks for it here": "此处无支持该类别之处",
        "none": "无",
        "most": "最强",
        "No font has some of the letters: their Unicode numbers are shown.": (
            "某些字符没有字体: 以其 Unicode 编号显示。"
        ),
        "More fonts: {command}": "更多字体: {command}",
    },
    cifar10_classes={
        "airplane": "飞机",
        "automobile": "汽车",
        "bird": "鸟类",
        "cat": "猫",
        "deer": "鹿",
        "dog": "狗",
        "frog": "青蛙",
        "horse": "马",
        "ship": "船",
        "truck": "卡车",
    },
)
VOCABULARIES = {"en": ENGLISH, "zh": CHINESE}
# Debian's packages.
CHINESE_FONTS = "apt install fonts-noto-cjk"
ALL_FONTS = "apt install fonts-noto-cjk fonts-noto-core"

_vocabulary = ContextVar("vocabulary", default=ENGLISH)


@contextmanager
def language(name: str, class_names: Collection[str] = ()) -> Iterator[None]:
    """Draw figures in a language. Without a font for it they are in English, which is printed once.

    Args:
        name: "en" or "zh".
        class_names: Names of all classes of the figures. Only those of CIFAR-10 are translated.

    Raises:
        UserError: Any other language.
    """
    check("language", name, lambda value: value in VOCABULARIES, " or ".join(VOCABULARIES))
    vocabulary = ENGLISH
    families = [DEFAULT_FAMILY]
    if name != "en" and _can_be_drawn(name):
        vocabulary = VOCABULARIES[name]
        families = installed_families()
    if set(class_names) != set(vocabulary.cifar10_classes):
        vocabulary = Vocabulary(vocabulary.words, cifar10_classes={})
    token = _vocabulary.set(vocabulary)
    try:
        with rc_context({"font.family": families}):
            yield
    finally:
        _vocabulary.reset(token)


@cache
def _can_be_drawn(name: str) -> bool:
    vocabulary = VOCABULARIES[name]
    translations = [*vocabulary.words.values(), *vocabulary.cifar10_classes.values()]
    if not missing_letters("".join(translations)):
        return True
    print(
        f"Figures are in English: no font here has the letters of {name} ({CHINESE_FONTS}).",
        file=sys.stderr,
    )
    return False


def word(text: str, **values: Any) -> str:
    """Return an English text in the language of the figure, formatted with `values`."""
    return _vocabulary.get().words.get(text, text).format(**values)


def class_name(name: str) -> str:
    """Return the name of a class in the language of the figure."""
    return _vocabulary.get().cifar10_classes.get(name, name)


def language_of(run: Path) -> str:
    """Return the language in a run's configuration, or "en" if there is none.

    Raises:
        UserError: The configuration is no text, or too large.
    """
    try:
        return str(read_yaml(run / CONFIG)["report"]["language"])
    except (OSError, LookupError, TypeError):
        return "en"


@dataclass(frozen=True)
class Lettering:
    """How names that users have given are drawn.

    Attributes:
        families: Fonts for these names.
        note: Two short lines to draw below the figure if letters were replaced, else "".
    """

    families: list[str]
    note: str
    _replacements: Mapping[int, str]  # by the number of a letter

    def text(self, name: str) -> str:
        """Return the text to draw for a name."""
        return printable(name).translate(self._replacements)


def lettering(names: Iterable[str]) -> Lettering:
    r"""Return how to draw names of any script.

    A letter that no font has becomes its escape, such as `\u732b`.
    """
    replacements = {ord("$"): r"\$"}  # a dollar sign alone would begin a formula
    missing = missing_letters(printable("".join(names)))
    for letter in missing:
        replacements[ord(letter)] = letter.encode("unicode_escape").decode()
    note = ""
    if missing:
        explanation = word("No font has some of the letters: their Unicode numbers are shown.")
        hint = word("More fonts: {command}", command=ALL_FONTS)
        note = f"{explanation}\n{hint}"
    return Lettering(installed_families(), note, replacements)
