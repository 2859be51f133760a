"""Image files as a command line names them: files, folders, patterns, and `-` for a list."""

import glob
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator

from cifar_transfer.base.errors import UserError
from cifar_transfer.data.images import EXTENSIONS
from cifar_transfer.data.left_aside import LeftAside
from cifar_transfer.data.listing import images_below

_URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)


def image_files(
    names: Iterable[str],
    on_error: Callable[[UserError], None],
    left_aside: LeftAside | None = None,
) -> Iterator[str]:
    """Yield the files that names stand for, while they are asked for: a list may be endless.

    Args:
        names: Files, which need not exist; folders, for all images anywhere below them, sorted;
            patterns with `*`, `?`, `[...]` and `**`, for shells that do not expand them; "-" for
            names on standard input, one a line. `~` at the beginning is the user's home.
        on_error: Called with the reason if a name stands for nothing.
        left_aside: Counts the files in folders that are passed over.
    """
    if left_aside is None:
        left_aside = LeftAside()
    for name in names:
        if name == "-":
            yield from image_files(_names_on_stdin(), on_error, left_aside)
            continue
        if not os.path.lexists(name):
            name = os.path.expanduser(name)
        if _URL.match(name):
            on_error(
                UserError(
                    f"{name} is a URL, and only files are read: "
                    "download it first, and name the file."
                )
            )
        elif os.path.isdir(name):
            yield from _in_folder(name, on_error, left_aside)
        elif glob.has_magic(name) and not os.path.lexists(name):
            yield from image_files(_matches(name, on_error), on_error, left_aside)
        else:
            yield name


def _names_on_stdin() -> Iterator[str]:
    for line in sys.stdin.buffer:  # bytes, because the name of a file need not be text
        name = os.fsdecode(line.rstrip(b"\r\n"))
        if name.strip():
            yield name


def _in_folder(
    folder: str, on_error: Callable[[UserError], None], left_aside: LeftAside
) -> Iterator[str]:
    is_empty = True
    for path in images_below(folder, on_error, left_aside):
        is_empty = False
        yield path
    if is_empty:
        endings = " ".join(EXTENSIONS)
        on_error(UserError(f"{folder} has no images, not below it either ({endings})."))


def _matches(pattern: str, on_error: Callable[[UserError], None]) -> list[str]:
    """Return the files and folders that match a pattern, sorted."""
    matches = sorted(glob.iglob(pattern, recursive=True))
    if "**" in pattern:
        # It also matches what is in the folders.
        matches = [match for match in matches if not os.path.isdir(match)]
    if not matches:
        on_error(UserError(f"{pattern} matches no file."))
    return matches
