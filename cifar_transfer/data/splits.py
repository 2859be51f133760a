"""Which image is in which split: chosen by a hash, recorded with the run, kept when the run continues."""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Collection, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Literal

import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from cifar_transfer.base.errors import UserError, first_line
from cifar_transfer.base.files import atomic_write
from cifar_transfer.base.untrusted import open_regular

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
RECORD = "splits.json.gz"  # in the folder of a run
Names = dict[
    Split, list[str]
]  # of the images of each split, as "train/cat/007.png": where it lies, class, name


def hold_out(names: Sequence[str], labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Choose images by a hash of their names, so that adding or removing some moves no other.

    Except that of each class the lowest hash is always held out, and the highest (also of a class of one) never.

    Args:
        names: Class and name of each of N images, all different.
        labels: int64 [N].
        fraction: Share to hold out, in (0, 1). Of n images it is met up to about `sqrt(n * fraction)`.
        seed: Another seed chooses other images.

    Returns:
        bool [N], whether an image is held out.
    """
    key = str(seed).encode()
    digests = (
        blake2b(name.encode(errors="surrogatepass"), digest_size=8, key=key).digest()
        for name in names
    )
    hashes = np.frombuffer(b"".join(digests), ">u8")
    held_out = hashes < fraction * 2.0**64
    order = np.lexsort((hashes, labels))  # by class, then by hash
    last = np.flatnonzero(np.diff(labels[order], append=-1))
    held_out[order[np.concatenate(([0], last[:-1] + 1))]] = True
    held_out[order[last]] = False
    return held_out


def hold_out_as_before(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """The choice of older runs, with which they continue: by a permutation of each class; else as `hold_out`."""
    rng = np.random.default_rng(seed)
    held_out = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        count = min(max(round(len(rows) * fraction), 1), len(rows) - 1)
        held_out[rows[:count]] = True
    return held_out


def write(folder: Path, names: Names) -> None:
    """Record the splits of a run in its folder."""
    with atomic_write(folder / RECORD) as file:
        file.write(
            gzip.compress(json.dumps(names).encode(), mtime=0)
        )  # ASCII, with escapes for all else


def read(checkpoint: str | Path) -> Names | None:
    """The splits recorded by the run that a checkpoint lies in, or None where there is no record.

    Raises:
        UserError: The record is damaged.
    """
    parents = (
        Path(checkpoint).resolve().parents
    )  # RUN/checkpoints/last.ckpt, or SLURM's RUN/hpc_ckpt_1.ckpt
    path = next(
        (folder / RECORD for folder in parents[:2][::-1] if (folder / RECORD).is_file()), None
    )
    if path is None:
        return None
    try:
        with open_regular(path) as file, gzip.open(file) as unpacked:
            names = json.loads(unpacked.read())
        return {split: [str(name) for name in names[split]] for split in SPLITS}
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError):
        raise UserError(
            f"{path}, the record of which images were trained on, is damaged: restore it, or remove it if the images "
            f"are those that the run began with."
        ) from None


def listed(path: str | Path) -> frozenset[str]:
    """The names in the column `image` of a CSV.

    Raises:
        UserError: It cannot be read, or has no such column.
    """
    try:
        with open_regular(path) as file:
            rows = csv.DictReader(io.TextIOWrapper(file, "utf-8-sig", newline=""))
            if "image" in (rows.fieldnames or ()):
                return frozenset(row["image"] for row in rows if row["image"])
    except (OSError, UnicodeError, csv.Error) as error:
        why = first_line(error)
        raise UserError(
            f"leave_out={path} cannot be read as a list of images ({why}): name another one."
        ) from None
    raise UserError(
        f"leave_out={path} has no column `image`: it takes a CSV as `python -m cifar_transfer audit` writes."
    )


def mark(path: str) -> str:
    """What tells the list of a CSV from another one, however it is written; errors are those of `listed`."""
    return digest(sorted(listed(path)))


def digest(names: Sequence[str]) -> str:
    """How many names there are, and what tells them from others."""
    return f"{len(names):,} images ({zlib.crc32(json.dumps(names).encode()):08x})"


def as_listed(name: str) -> str:
    """A name in a list, where what is no text in it is written as escapes."""
    return name.encode(errors="backslashreplace").decode()


def others(names: Sequence[str], out: Collection[str]) -> np.ndarray:
    """Rows int64 of the names that are not listed."""
    return np.flatnonzero([as_listed(name) not in out for name in names])


def without(names: Names, path: str) -> dict[Split, np.ndarray]:
    """Rows int64 of each split but for the images that a CSV lists.

    Raises:
        UserError: As `listed`; or it lists none of these images, or all of a split.
    """
    out = listed(path)
    rows = {split: others(found, out) for split, found in names.items()}
    out_of = {
        split: (len(names[split]) - len(rows[split]), len(names[split]))
        for split in SPLITS
        if split in names
    }
    if out and not any(count for count, _ in out_of.values()):
        raise UserError(
            f"leave_out={path} lists none of these images, but, say, {min(out)}: it is of others."
        )
    for split, left in rows.items():
        if names[split] and not len(left):
            raise UserError(f"leave_out={path} lists all {split} images: list fewer.")
    said = ", ".join(f"{count:,} of {all_:,} {split}" for split, (count, all_) in out_of.items())
    rank_zero_info(f"Left out: {said} images, those in {path}.")
    return rows


def changes(now: Names, before: Names) -> str | None:
    """What has changed since the splits were recorded, in a sentence, or None."""
    present, recorded = (
        {name for names in splits.values() for name in names} for splits in (now, before)
    )
    new, gone = len(present - recorded), len(recorded - present)
    if not new and not gone:
        return None
    return (
        f"The images have changed since the run began: {new:,} are new and {gone:,} are gone. Validation stays with "
        f"those of its images that are left."
    )
