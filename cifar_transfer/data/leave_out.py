"""Images that are left out because a file lists them: the option `leave_out` of data modules."""

import csv
import io
import re
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from cifar_transfer.base.errors import UserError, first_line
from cifar_transfer.base.files import user_path
from cifar_transfer.base.text import composed
from cifar_transfer.base.untrusted import open_regular


def read_image_list(path: str | Path) -> frozenset[str]:
    """Return the names in the column `image` of a CSV.

    Raises:
        UserError: The file cannot be read, or has no such column.
    """
    try:
        with open_regular(user_path(path)) as file:
            rows = csv.DictReader(io.TextIOWrapper(file, "utf-8-sig", newline=""))
            if "image" in (rows.fieldnames or ()):
                names = [row["image"] for row in rows if row["image"]]
                return frozenset(composed(name) for name in names)
    except (OSError, UnicodeError, csv.Error) as error:
        reason = first_line(error)
        if isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        raise UserError(
            f"leave_out={path} cannot be read as a list of images ({reason}): name another one."
        ) from None
    raise UserError(
        f"leave_out={path} has no column `image`: it takes a CSV as "
        f"`python -m cifar_transfer audit` writes."
    )


def unlisted_rows(names: Sequence[str], image_list: Collection[str]) -> np.ndarray:
    """Return the rows, int64, of the names that are not in a list.

    A list may name an image by its number ("cat/42") or by its file ("cat/00042.png").
    """
    numbers = {by_number(listed) for listed in image_list}
    unlisted = []
    for row, name in enumerate(names):
        written = as_listed(name)
        # Two files, "cat/1.png" and "cat/1.jpg", are not the same image: one side is a number.
        if written in image_list or by_number(written) in image_list or written in numbers:
            continue
        unlisted.append(row)
    return np.array(unlisted, np.int64)


def as_listed(name: str) -> str:
    """Return a name as lists have it: bytes that are not UTF-8 are written as escapes."""
    return name.encode(errors="backslashreplace").decode()


def by_number(name: str) -> str:
    """Return "cat/42" for "cat/00042.png"; other names stay as they are.

    CIFAR-10 has numbers for names. So its images are called alike in all of its layouts.
    """
    return re.sub(r"/(\d+)(\.[^/]*)?$", lambda match: f"/{int(match[1])}", name)
