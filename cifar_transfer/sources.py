"""Image files as a command line names them: files, folders, patterns, and `-` for a list on standard input."""

import glob
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator

from torchvision.datasets.folder import IMG_EXTENSIONS

from cifar_transfer.errors import UserError

_URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)


def find(names: Iterable[str], refuse: Callable[[UserError], None]) -> Iterator[str]:
    """The files behind names, found while they are asked for, so that a list may be endless.

    Args:
        names: Files, taken as they are, even if they do not exist; folders, for all images anywhere below them, sorted;
            patterns with `*`, `?`, `[...]` and `**`, for shells that do not expand them; "-" for names on standard
            input, one a line.
        refuse: Called with the reason where a name stands for nothing: a URL, a pattern without matches, a folder
            without images.
    """
    for name in names:
        if name == "-":
            # In bytes, as the names of files are no text to everybody.
            lines = (os.fsdecode(line.rstrip(b"\r\n")) for line in sys.stdin.buffer)
            yield from find((line for line in lines if line.strip()), refuse)
        elif _URL.match(name):
            refuse(UserError(f"{name} is a URL, and only files are read: download it first, and name the file."))
        elif os.path.isdir(name):
            yield from _folder(name, refuse)
        elif glob.has_magic(name) and not os.path.lexists(name):
            # `**` has matched what is in the folders that it matched.
            matches = [m for m in glob.iglob(name, recursive=True) if "**" not in name or not os.path.isdir(m)]
            if not matches:
                refuse(UserError(f"{name} matches no file."))
            yield from find(sorted(matches), refuse)
        else:
            yield name


def _folder(folder: str, refuse: Callable[[UserError], None]) -> Iterator[str]:
    found = False
    for path in images_below(folder, refuse):
        found = True
        yield path
    if not found:
        refuse(UserError(f"{folder} has no images, not below it either ({' '.join(IMG_EXTENSIONS)})."))


def images_below(folder: str, refuse: Callable[[UserError], None]) -> Iterator[str]:
    """Files named as images, anywhere below a folder and sorted; links are followed, but not in circles.

    What is hidden, as the notes that systems leave beside images (`._cat.jpg`), is left out, and so are pipes and
    devices. A link to nothing is a file that cannot be read.

    Args:
        folder: Where to look.
        refuse: Called with the reason where a folder cannot be read.
    """
    return _below(folder, frozenset([os.path.realpath(folder)]), refuse)


def _below(folder: str, above: frozenset[str], refuse: Callable[[UserError], None]) -> Iterator[str]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        refuse(UserError(f"{folder} cannot be read ({error.strerror})."))
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        link = entry.is_symlink()
        if os.path.isdir(entry.path) if link else entry.is_dir():  # which fails for a link to itself
            if (real := os.path.realpath(entry.path)) not in above:
                yield from _below(entry.path, above | {real}, refuse)
        elif entry.name.lower().endswith(IMG_EXTENSIONS) and (link or entry.is_file()):
            yield entry.path
