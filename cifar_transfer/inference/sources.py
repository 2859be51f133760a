"""Image files as a command line names them: files, folders, patterns, and `-` for a list."""

import fnmatch
import glob
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from cifar_transfer.base.errors import UserError
from cifar_transfer.data.images import EXTENSIONS
from cifar_transfer.data.left_aside import LeftAside, is_left_aside
from cifar_transfer.data.listing import images_below

_URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
WILDCARDS = "*?["  # with which a pattern begins that spells no name


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
            yield from image_files(_matches(name, on_error, left_aside), on_error, left_aside)
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


def _matches(
    pattern: str, on_error: Callable[[UserError], None], left_aside: LeftAside
) -> list[str]:
    """Return the files and folders that match a pattern, sorted.

    Those in hidden folders and in folders that systems make are passed over, as anywhere below a
    folder, unless the pattern spells the name of the folder.
    """
    spelt_parts = [part for part in Path(pattern).parts if part[0] not in WILDCARDS]
    matches = []
    for match in sorted(glob.iglob(pattern, recursive=True)):
        is_folder = os.path.isdir(match)
        if is_folder and "**" in pattern:
            continue  # the pattern also matches what is in it
        folder_names = Path(match).parts
        if not is_folder:
            folder_names = folder_names[:-1]
        system_folder = _first_left_aside(folder_names, spelt_parts)
        if system_folder is None:
            matches.append(match)
        elif is_folder:
            left_aside.add_folder(system_folder, match)
        else:
            left_aside.add_file_in(system_folder)
    if not matches:
        on_error(UserError(f"{pattern} matches no file."))
    return matches


def _first_left_aside(folder_names: Sequence[str], spelt_parts: Sequence[str]) -> str | None:
    """Return the first folder that is left aside and whose name no part of a pattern spells."""
    for name in folder_names:
        is_spelt = any(fnmatch.fnmatchcase(name, part) for part in spelt_parts)
        if is_left_aside(name) and not is_spelt:
            return name
    return None
