"""Features of some images, read when they are needed."""

from collections.abc import Sequence

import numpy as np


class ChosenRows:
    """Rows of several arrays of features, in place of an array float32 [N, D] of these rows.

    It has a length and takes an index, as heads need. Rows are read when they are asked for, so
    that memory is bounded however many there are.

    Args:
        arrays: Arrays float32 [M, D], which may be memory-mapped. Their rows are counted through.
        rows: The N rows, int64.
    """

    def __init__(self, arrays: "Sequence[FeatureArray]", rows: np.ndarray) -> None:
        self.arrays = arrays
        self.rows = rows
        self.width: int = arrays[0].shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """Number of rows, and of features."""
        return len(self.rows), self.width

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    def __getitem__(self, index: slice | np.ndarray) -> np.ndarray:
        """Return some of the rows, float32 [B, D].

        Args:
            index: A slice, rows (int64 [B]), or whether each row is meant (bool [N]).
        """
        rows = self.rows[index]
        values = np.empty((len(rows), self.width), np.float32)
        first_row = 0
        for array in self.arrays:
            end = first_row + len(array)
            is_in_array = (rows >= first_row) & (rows < end)
            values[is_in_array] = array[rows[is_in_array] - first_row]
            first_row = end
        return values


FeatureArray = np.ndarray | ChosenRows  # float32 [N, D]
