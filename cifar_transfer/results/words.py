"""Words on figures: in the language of a run, in fonts that have their letters.

Names in any script are drawn in an installed font that has their letters, or in Latin letters with a note, never as
boxes. A plot has its English words in `word(...)`, which is Chinese within `language("zh")`.
"""

import sys
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from anyascii import anyascii
from matplotlib import font_manager, rc_context
from matplotlib.ft2font import FT2Font

from cifar_transfer.base.errors import check
from cifar_transfer.base.files import CONFIG
from cifar_transfer.base.text import printable
from cifar_transfer.base.untrusted import read_yaml
from cifar_transfer.data.cifar import CLASSES

Language = Literal["en", "zh"]
CHINESE = {
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
    "Learning rate by stage at the end of each epoch (grey: 0)": "各轮结束时各阶段的学习率 (灰色: 0)",
    "Confusion matrix: {score} {value:.2%} of {count:,} images": "混淆矩阵: {score} {value:.2%} ({count:,} 张图像)",
    "The {shown} of {all:,} classes with the most mistakes": "{all:,} 个类别中错误最多的 {shown} 个",
    "The {shown} of {all:,} classes with the lowest F1": "{all:,} 个类别中 F1 最低的 {shown} 个",
    "number of images": "图像数",
    "% of the class": "占该类别的 %",
    "predicted": "预测类别",
    "true": "真实类别",
    "precision": "精确率",
    "recall": "召回率",
    "images": "图像数",
    "confidence": "置信度",
    "expected calibration error {error:.1%}": "期望校准误差 {error:.1%}",
    "The most confident mistakes": "置信度最高的错误",
    "Correct": "预测正确",
    "is {name}": "真实: {name}",
    "said {name}": "预测: {name}",
    "{share:.1%} sure": "置信度 {share:.1%}",
    "Training images as the network sees them, {size} pixels": "网络所见的训练图像, {size} 像素",
    "The first {shown} of {all:,} images": "{all:,} 张图像中的前 {shown} 张",
    "what speaks for it": "支持该类别之处",
    "nothing speaks for it here": "此处无支持该类别之处",
    "none": "无",
    "most": "最强",
    "Names in Latin letters: no font here has theirs (Noto Sans CJK has many).": "名称以拉丁字母显示: 没有合适的字体",
}
CHINESE_CLASSES = dict(
    zip(
        CLASSES, ("飞机", "汽车", "鸟类", "猫", "鹿", "狗", "青蛙", "马", "船", "卡车"), strict=True
    )
)
TABLES: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "en": ({}, {}),
    "zh": (CHINESE, CHINESE_CLASSES),
}
_current = ContextVar("language", default=TABLES["en"])
BASE = "DejaVu Sans"  # comes with matplotlib
# Broad fonts of the systems people have, tried before all others, whose choice would be arbitrary.
BROAD = (
    "Noto Sans CJK SC",
    "Source Han Sans SC",
    "WenQuanYi Micro Hei",
    "Microsoft YaHei",
    "PingFang SC",
    "Noto Sans",
)


@contextmanager
def language(name: str, classes: Collection[str] = ()) -> Iterator[None]:
    """Have figures drawn in a language, or, if no font has its letters, in English, which is said once.

    Args:
        name: "en" or "zh".
        classes: Names of all classes; those of CIFAR-10, and no others, are translated.

    Raises:
        UserError: Another name.
    """
    check("language", name, lambda it: it in TABLES, " or ".join(TABLES))
    families = _families(name)
    words, names = TABLES[name if families else "en"]
    token = _current.set((words, names if {*classes} == {*CLASSES} else {}))
    try:
        with rc_context({"font.family": families or [BASE]}):
            yield
    finally:
        _current.reset(token)


@lru_cache
def _families(name: str) -> list[str] | None:
    found = lettering("".join(text) for table in TABLES[name] for text in table.values())
    if not found.note:
        return found.families
    print(
        f"Figures are in English: no font here has the letters of {name} (Noto Sans CJK has).",
        file=sys.stderr,
    )
    return None


def word(text: str, **values: Any) -> str:
    """An English text in the language of the figure, `values` put in by `str.format`."""
    return _current.get()[0].get(text, text).format(**values)


def class_name(name: str) -> str:
    """The name of a class in the language of the figure, as far as it is translated."""
    return _current.get()[1].get(name, name)


def language_of(run: Path) -> str:
    """The language in a run's configuration; English where there is none. Errors are those of `read_yaml`."""
    try:
        return str(read_yaml(run / CONFIG)["report"]["language"])
    except (OSError, LookupError, TypeError):
        return "en"


class Lettering(NamedTuple):
    """How names are drawn."""

    families: list[str]  # fonts for matplotlib, which takes each letter from the first that has it
    names: dict[str, str]  # what is drawn for each name
    note: str  # what was done to the names and why, or nothing


def lettering(names: Iterable[str]) -> Lettering:
    """Find fonts for names in any script; without one for all its letters, a name is transliterated by anyascii."""
    texts = {name: printable(name) for name in names}
    missing, families = (
        set[str]().union(*texts.values()) - _letters(font_manager.findfont(BASE)),
        [BASE],
    )
    for font in sorted(
        font_manager.fontManager.ttflist, key=lambda font: (font.name not in BROAD, font.name)
    ):
        if not missing:
            break
        # The font of last resort, which comes with matplotlib, draws boxes.
        if font.weight not in (400, "regular") or "Last Resort" in font.name:
            continue
        if found := missing & _letters(font.fname):
            families.append(font.name)
            missing -= found
    drawn = {
        name: anyascii(text).strip() if missing.intersection(text) else text
        for name, text in texts.items()
    }
    latin = any(drawn[name] != text for name, text in texts.items())
    note = (
        word("Names in Latin letters: no font here has theirs (Noto Sans CJK has many).")
        if latin
        else ""
    )
    # A dollar sign would begin a formula.
    return Lettering(
        families, {name: shown.replace("$", r"\$") for name, shown in drawn.items()}, note
    )


@lru_cache(maxsize=256)
def _letters(path: str) -> frozenset[str]:
    return frozenset(map(chr, FT2Font(path).get_charmap()))
