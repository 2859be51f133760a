"""Class names in figures: in a font that has their letters, or in Latin letters with a note, never in boxes."""

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from anyascii import anyascii
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

BASE = "DejaVu Sans"  # comes with matplotlib
# Broad fonts of the systems people have; looked at before all others, whose choice would be arbitrary.
BROAD = ("Noto Sans CJK SC", "Source Han Sans SC", "WenQuanYi Micro Hei", "Microsoft YaHei", "PingFang SC", "Noto Sans")


class Lettering(NamedTuple):
    """How a set of names is drawn.

    Attributes:
        families: Fonts for matplotlib, which takes each letter from the first that has it.
        names: What is drawn for each of the names.
        note: What was done to the names and why, or nothing.
    """

    families: list[str]
    names: list[str]
    note: str


def lettering(names: Iterable[str]) -> Lettering:
    """Find fonts for names in any script.

    A name of which no installed font has all letters is written in Latin letters (https://anyascii.com).
    """
    names = list(names)
    missing = {letter for name in names for letter in name} - _letters(font_manager.findfont(BASE))
    families = [BASE]
    if missing:
        # The font of last resort, which comes with matplotlib, draws boxes.
        known = [font for font in font_manager.fontManager.ttflist if not font.name.startswith("Last Resort")]
        fonts = sorted(known, key=lambda font: (font.name not in BROAD, font.name))
        for font in fonts:
            if font.weight in (400, "regular") and (found := missing & _letters(font.fname)):
                families.append(font.name)
                missing -= found
            if not missing:
                break
    drawn = [anyascii(name).strip() if set(name) & missing else name for name in names]
    # A dollar sign would begin a formula.
    shown = [name.replace("$", r"\$") for name in drawn]
    note = "" if drawn == names else "Names in Latin letters: no font here has theirs (Noto Sans CJK has many)."
    return Lettering(families, shown, note)


@lru_cache(maxsize=256)
def _letters(path: str) -> frozenset[str]:
    return frozenset(map(chr, FT2Font(path).get_charmap()))
