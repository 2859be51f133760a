"""Fonts of figures: matplotlib takes each letter from the first family of a list that has it.

The list is fixed. Which of its families are installed, matplotlib's cached list of fonts says. A
font that was installed later is not in there: it is added when a letter is missing.
"""

from collections.abc import Iterable
from contextlib import suppress
from functools import cache

from matplotlib import font_manager

DEFAULT_FAMILY = "DejaVu Sans"  # comes with matplotlib
FAMILIES = (
    DEFAULT_FAMILY,
    # Chinese, Japanese and Korean. Before 3.11, matplotlib sees only the first of the families in
    # one file, which in fonts-noto-cjk is the Japanese one.
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Source Han Sans SC",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "Microsoft YaHei",
    "SimHei",
    "PingFang SC",
    "Hiragino Sans GB",
    "Malgun Gothic",
    # Other scripts: fonts-noto-core has a family for each.
    "Noto Sans",
    "Noto Sans Arabic",
    "Noto Sans Armenian",
    "Noto Sans Bengali",
    "Noto Sans Devanagari",
    "Noto Sans Ethiopic",
    "Noto Sans Georgian",
    "Noto Sans Gujarati",
    "Noto Sans Gurmukhi",
    "Noto Sans Hebrew",
    "Noto Sans Kannada",
    "Noto Sans Khmer",
    "Noto Sans Lao",
    "Noto Sans Malayalam",
    "Noto Sans Myanmar",
    "Noto Sans Sinhala",
    "Noto Sans Symbols",
    "Noto Sans Tamil",
    "Noto Sans Telugu",
    "Noto Sans Thai",
    "Arial Unicode MS",
    "Segoe UI",
    "Segoe UI Symbol",
    "STIXGeneral",  # comes with matplotlib
)


def installed_families() -> list[str]:
    """Return the families of the list that are installed, in the order of the list."""
    installed = {font.name for font in font_manager.fontManager.ttflist}
    return [family for family in FAMILIES if family in installed]


def missing_letters(text: Iterable[str]) -> set[str]:
    """Return the letters of a text that no installed family of the list has."""
    missing = _missing_in_list(text)
    if missing:
        _add_new_fonts()
        missing = _missing_in_list(missing)
    return missing


def _missing_in_list(letters: Iterable[str]) -> set[str]:
    missing = set(letters)
    for family in installed_families():
        font = font_manager.get_font(font_manager.findfont(family))
        for letter in list(missing):
            if font.get_char_index(ord(letter)):
                missing.remove(letter)
    return missing


@cache
def _add_new_fonts() -> None:
    """Add the fonts that were installed after matplotlib had made its list.

    The file of the list stays as it is.
    """
    listed = {font.fname for font in font_manager.fontManager.ttflist}
    for path in font_manager.findSystemFonts():
        if path not in listed:
            # Of any kind: matplotlib, too, passes over font files that it cannot read.
            with suppress(Exception):
                font_manager.fontManager.addfont(path)
