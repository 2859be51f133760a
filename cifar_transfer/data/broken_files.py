"""Image files that cannot be read: all are found before training, and listed or left out."""

from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from cifar_transfer.base.errors import UserError
from cifar_transfer.base.files import write_csv
from cifar_transfer.base.text import printable
from cifar_transfer.data.cache import decoded_batches, remember, remembered, writable_folder
from cifar_transfer.data.images import Images, UnreadableImages, read_image
from cifar_transfer.data.splits import SPLITS, Split

LIST = "broken.csv"  # beside the caches: all broken files, as `leave_out` takes them
MAX_NAMED_FILES = 3  # in the warning about those that are left out

Reasons = dict[str, str]  # why files cannot be read, by path


class BrokenFiles:
    """The files of a data set that cannot be read, by split.

    Args:
        folder: Folder of the data, beside which they are listed.

    Attributes:
        reasons: Why each of them cannot be read, by its name, such as "train/cat/007.png".
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.reasons: dict[Split, dict[str, str]] = {}
        self._num_told = 0

    def __len__(self) -> int:
        return sum(map(len, self.reasons.values()))

    def set(self, split: Split, reasons_by_name: dict[str, str]) -> None:
        """Take up the broken files of a split, in place of those that were known of it."""
        self.reasons.pop(split, None)
        if reasons_by_name:
            self.reasons[split] = reasons_by_name

    def write_list(self) -> Path | None:
        """Write a table of all of them, and return where it is; None if it cannot be written."""
        folder = writable_folder(self.folder)
        if folder is None:
            return None
        path = folder / LIST
        rows = [("image", "reason")]
        for reasons in self.reasons.values():
            rows += reasons.items()
        try:
            _write_list(path, rows)
        except OSError:
            return None
        return path

    def summary(self) -> str:
        """Return what is left out: "2 train, 1 test images that cannot be read, listed in FILE"."""
        counts = [
            f"{len(self.reasons[split]):,} {split}" for split in SPLITS if split in self.reasons
        ]
        text = f"{', '.join(counts)} images that cannot be read"
        path = self.write_list()
        if path is not None:
            text += f", listed in {path}"
        return text

    def tell(self) -> None:
        """Warn of the files that are left out, once."""
        if len(self) == self._num_told:
            return
        self._num_told = len(self)
        names = [name for reasons in self.reasons.values() for name in reasons]
        shown = ", ".join(names[:MAX_NAMED_FILES])
        if len(names) > MAX_NAMED_FILES:
            shown += ", ..."
        rank_zero_warn(f"Left out: {self.summary()} ({printable(shown)}).")

    def error(self, error: UnreadableImages) -> UnreadableImages:
        """Return an error that also names the list, and the way to leave the files out."""
        advice = "skip_broken=true leaves them out."
        path = self.write_list()
        if path is not None:
            advice = f"All are listed in {path}; {advice}"
        return UnreadableImages(*error.reasons, advice=advice)


@rank_zero_only
def _write_list(path: Path, rows: Sequence[Sequence[str]]) -> None:
    write_csv(path, rows)


def find_broken(
    images: Images, folder: Path, name: str, fingerprint: object, are_checked: bool
) -> Reasons:
    """Return the files that cannot be read, after all were decoded once; that is remembered.

    Args:
        images: The files.
        folder: Folder of the data.
        name: Name of their cache.
        fingerprint: Changes when a file does.
        are_checked: Whether all of them were decoded before, and can be read.
    """

    def decode_all() -> Reasons:
        if are_checked:
            return {}
        try:
            for _ in decoded_batches(images, f"checking {name}"):
                pass
        except UnreadableImages as error:
            return dict(zip(error.paths, error.reasons, strict=True))
        return {}

    return remembered(folder, f"{name}-checked", fingerprint, decode_all)


def still_broken(paths: Sequence[str], max_megapixels: float, folder: Path, name: str) -> Reasons:
    """Return those of a split's files that were broken before, and are so still.

    Args:
        paths: Files of the split.
        max_megapixels: Larger images are refused.
        folder: Folder of the data.
        name: Name of their cache.
    """
    reasons = {}
    broken_before = remembered(folder, f"{name}-broken", None, list)
    if not broken_before:
        return {}
    for path in set(paths).intersection(broken_before):
        try:
            read_image(path, None, max_megapixels)
        except UserError as error:
            reasons[path] = str(error)
    return reasons


def remember_broken(reasons: Reasons, folder: Path, name: str) -> None:
    """Remember the broken files of a split for `still_broken`."""
    remember(folder, f"{name}-broken", None, list(reasons))
