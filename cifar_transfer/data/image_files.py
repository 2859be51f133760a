"""The list of a split's image files, and how images are called in lists and records."""

import os
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from cifar_transfer.base.text import composed


class Files(NamedTuple):
    """Image files of a split.

    Attributes:
        paths: Paths of N files.
        labels: Their labels, int64 [N].
        names: Their names in lists and records, all different, such as "cat/007.png".
    """

    paths: Sequence[str]
    labels: np.ndarray
    names: Sequence[str]

    def without(self, paths: Collection[str]) -> "Files":
        """Return the files but for those of some paths."""
        rows = [row for row, path in enumerate(self.paths) if path not in paths]
        return Files(
            [self.paths[row] for row in rows],
            self.labels[rows],
            [self.names[row] for row in rows],
        )

    def by_name(self, texts: Mapping[str, str], prefix: str) -> dict[str, str]:
        """Return texts for paths, such as why files cannot be read, by the names of the images.

        Args:
            texts: Text for each path, also of other files.
            prefix: Beginning of the names, such as "train/".
        """
        by_name = {}
        for path, name in zip(self.paths, self.names, strict=True):
            if path in texts:
                by_name[f"{prefix}{name}"] = texts[path]
        return by_name


def portable_name(relative_path: str) -> str:
    """Return the name of an image in lists and records, the same on all systems."""
    return composed(relative_path.replace(os.sep, "/"))
