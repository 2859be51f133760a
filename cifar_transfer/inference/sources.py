"""Image files as a command line names them: files, folders, patterns, and `-` for a list on standard input."""

import glob
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator

from cifar_transfer.base.errors import UserError
from cifar_transfer.data.images import EXTENSIONS, images_below

_URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)


def find(names: Iterable[str], refuse: Callable[[UserError], None]) -> Iterator[str]:
    """The files behind names, found while they are asked for, so that a list may be endless.

    Args:
        names: Files, taken as they are, even if they do not exist; folders, for all images anywhere below them, sorted;
            patterns with `*`, `?`, `[...]` and `**`, for shells that do not expand them; "-" for names on standard
            input, one a line.
        refuse: Called with the reason where a name stands for nothing.
    """
    for name in names:
        if name == "-":
            # In bytes, because a file's name need not be text.
            lines = (os.fsdecode(line.rstrip(b"\r\n")) for line in sys.stdin.buffer)
            yield from find((line for line in lines if line.strip()), refuse)
        elif _URL.match(name):
            refuse(
                UserError(
                    f"{name} is a URL, and only files are read: download it first, and name the file."
                )
            )
        elif os.path.isdir(name):
            path = None
            for path in images_below(name, refuse):
                yield path
            if path is None:
                refuse(
                    UserError(
                        f"{name} has no images, not below it either ({' '.join(EXTENSIONS)})."
                    )
                )
        elif glob.has_magic(name) and not os.path.lexists(name):
            # `**` has matched what is in the folders that it matched.
            matches = [
                m
                for m in glob.iglob(name, recursive=True)
                if "**" not in name or not os.path.isdir(m)
            ]
            if not matches:
                refuse(UserError(f"{name} matches no file."))
            yield from find(sorted(matches), refuse)
        else:
            yield name
