"""Image files below a folder, and the count of what is passed over."""

import os
from collections.abc import Callable, Iterator
from contextlib import suppress

from cifar_transfer.base.errors import UserError
from cifar_transfer.data.images import EXTENSIONS
from cifar_transfer.data.left_aside import LeftAside, is_left_aside


def is_image_name(name: str) -> bool:
    """Return whether a file is named as an image that can be read, and is not hidden."""
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def images_below(
    folder: str,
    refuse: Callable[[UserError], None],
    left_aside: LeftAside,
    above: frozenset[str] = frozenset(),
) -> Iterator[str]:
    """Yield the files named as images anywhere below a folder, sorted.

    Hidden files and folders (such as macOS's `._cat.jpg`), folders that systems make (such as
    `@eaDir`, which has thumbnails), pipes and devices are left out.

    Args:
        folder: Where to look.
        refuse: Called with the reason if a folder cannot be read.
        left_aside: Counts what is left out.
        above: The real folders on the way to this one; links back to them are not followed.
    """
    real_folder = os.path.realpath(folder)
    if real_folder in above:
        return
    try:
        image_names, folder_names = _content(folder, left_aside)
    except OSError as error:
        refuse(UserError(f"{folder} cannot be read ({error.strerror})."))
        return
    beginning = os.path.join(folder, "")
    for name in sorted([*image_names, *folder_names]):
        path = beginning + name
        if name in folder_names:
            yield from images_below(path, refuse, left_aside, above | {real_folder})
        else:
            yield path  # also a broken link, which whoever reads it refuses


def _content(folder: str, left_aside: LeftAside) -> tuple[list[str], set[str]]:
    """Return the names of the images and of the folders in a folder.

    Names alone are kept: a million `DirEntry` objects would take 300 MB.
    """
    image_names = []
    folder_names = set()
    with os.scandir(folder) as entries:
        for entry in entries:
            # `entry.is_dir` fails for a link to itself.
            is_link = entry.is_symlink()
            is_folder = os.path.isdir(entry.path) if is_link else entry.is_dir()
            if is_folder and is_left_aside(entry.name):
                left_aside.add_folder(entry.name, entry.path)
            elif is_folder:
                folder_names.add(entry.name)
            elif not is_image_name(entry.name):
                left_aside.add_file(entry.name)
            elif is_link or entry.is_file():
                image_names.append(entry.name)
            else:
                left_aside.add("no regular file")
    return image_names, folder_names


def has_images_below(folder: str) -> bool:
    """Return whether there is a file that is named as an image in a folder or below it.

    The search ends at the first one, so that large folders cost nothing.
    """
    folders = [folder]
    seen = set()
    while folders:
        path = folders.pop()
        real_folder = os.path.realpath(path)
        if real_folder in seen:
            continue
        seen.add(real_folder)
        with suppress(OSError), os.scandir(path) as entries:
            for entry in entries:
                if not os.path.isdir(entry.path):
                    if is_image_name(entry.name):
                        return True
                elif not is_left_aside(entry.name):
                    folders.append(entry.path)
    return False
