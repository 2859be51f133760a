"""What is passed over among people's files, counted to be told once."""

import os
from collections import Counter
from contextlib import suppress

from cifar_transfer.base.files import LOGS
from cifar_transfer.base.text import printable
from cifar_transfer.data.images import HEIC_ADVICE, HEIC_EXTENSIONS

# Folders of thumbnails, waste and archives that systems make among files, in lower case. Hidden
# folders are left aside too.
SYSTEM_FOLDERS = frozenset(
    {
        "@eadir",  # Synology
        "@recycle",  # QNAP
        "@tmp",
        "#recycle",
        "#snapshot",
        "__macosx",  # zips that macOS makes
        "$recycle.bin",  # Windows
        "system volume information",
        "lost+found",
        LOGS,  # whose figures are no images of a class
    }
)
# Files that systems make, which nobody misses.
SYSTEM_FILES = frozenset({".ds_store", "thumbs.db", "ehthumbs.db", "desktop.ini"})
OWN_FOLDERS = frozenset({".cifar_transfer", LOGS})  # of which there is nothing to tell
MAX_ENDING_CHARS = 12  # more is part of a name with a full stop
MAX_KINDS = 8  # in a message


class LeftAside:
    """A count of the files that are passed over, by kind.

    Attributes:
        counts: Number of files for each kind, such as ".heic", "without ending" or "in @eaDir".
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def add_file(self, name: str) -> None:
        """Count a file that is not read, by its ending."""
        if name.lower() in SYSTEM_FILES:
            return
        if name.startswith("."):
            self.counts["hidden"] += 1
            return
        ending = os.path.splitext(name)[1].lower()
        is_ending = ending[1:].isalnum() and len(ending) <= MAX_ENDING_CHARS
        self.counts[ending if is_ending else "without ending"] += 1

    def add_folder(self, name: str, path: str) -> None:
        """Count what lies directly in a folder that is not looked into."""
        if name in OWN_FOLDERS:
            return
        with suppress(OSError):
            self.counts[f"in {name}"] += len(os.listdir(path))

    def add_file_in(self, folder_name: str) -> None:
        """Count a file that lies in a folder that is not looked into, or below it."""
        if folder_name not in OWN_FOLDERS:
            self.counts[f"in {folder_name}"] += 1

    def add(self, kind: str) -> None:
        """Count a file of any other kind, such as "beside the folders of classes"."""
        self.counts[kind] += 1

    def text(self) -> str | None:
        """Return "Left aside: 12 .heic, 3 without ending.", or None if there is nothing."""
        kinds = [(kind, count) for kind, count in self.counts.most_common() if count]
        if not kinds:
            return None
        parts = [f"{count:,} {printable(kind)}" for kind, count in kinds[:MAX_KINDS]]
        others = sum(count for _, count in kinds[MAX_KINDS:])
        if others:
            parts.append(f"{others:,} more")
        text = f"Left aside: {', '.join(parts)}."
        if any(self.counts[ending] for ending in HEIC_EXTENSIONS):
            text += f" {HEIC_ADVICE}."
        return text


def is_left_aside(folder_name: str) -> bool:
    """Return whether a folder is hidden, or one that systems make."""
    return folder_name.startswith(".") or folder_name.lower() in SYSTEM_FOLDERS
