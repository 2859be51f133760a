"""Many texts in little memory: names and paths of a million files."""

from array import array
from collections.abc import Iterable, Sequence
from copy import copy
from typing import overload

import numpy as np

SURROGATES = "surrogatepass"  # as which Python has bytes of names that are not UTF-8


class TextList(Sequence[str]):
    """Texts that begin alike, as one block of bytes.

    A list of a million paths takes 140 MB, and each process that reads it copies it. Here a text
    takes its bytes and eight more.

    Args:
        texts: The texts, without their common beginning.
        beginning: What all of them begin with.
    """

    def __init__(self, texts: Iterable[str], beginning: str = "") -> None:
        self.beginning = beginning
        block = bytearray()
        ends = array("q", [0])
        for text in texts:
            block += text.encode(errors=SURROGATES)
            ends.append(len(block))
        self._block = bytes(block)
        self._ends = np.array(ends, np.int64)

    def beginning_with(self, beginning: str) -> "TextList":
        """Return the texts with another common beginning, without a copy."""
        texts = copy(self)
        texts.beginning = beginning
        return texts

    @property
    def nbytes(self) -> int:
        """Memory of the texts in bytes."""
        return len(self._block) + self._ends.nbytes

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> list[str]: ...
    def __getitem__(self, row: int | slice) -> str | list[str]:
        if isinstance(row, slice):
            return [self[index] for index in range(*row.indices(len(self)))]
        return self.beginning + self.ending(row)

    def ending(self, row: int) -> str:
        """Return a text without the common beginning."""
        if not 0 <= row < len(self):
            raise IndexError(f"there are {len(self)} texts, and none of number {row}")
        return self._block[self._ends[row] : self._ends[row + 1]].decode(errors=SURROGATES)
