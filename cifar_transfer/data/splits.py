"""The images of each split: chosen by a hash, recorded with the run, kept when it continues."""

import gzip
import json
import secrets
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from cifar_transfer.base.errors import UserError
from cifar_transfer.base.files import LOGS, atomic_write
from cifar_transfer.base.untrusted import open_regular
from cifar_transfer.data.leave_out import read_image_list, unlisted_rows
from cifar_transfer.data.text_list import TextList

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
Names = dict[Split, list[str]]  # names of the images of each split, such as "train/cat/007.png"
# From names of the training images, "cat/007.png", to a text for each. Those of one text are a
# group: copies of each other, views of one thing.
GroupKeys = Callable[[Sequence[str]], Sequence[str]]

RECORD = "splits.json.gz"  # in the folder of a run
RUN_KEY = "run"  # in a record: identifier of the run, which its checkpoints have, too
GROUP_KEY = "group"  # in a record: the regular expression that grouped the images, or null
TEST_KEY = "test"  # in place of a seed for test images that are held out
REQUEUED = "hpc_ckpt_"  # begins the names of checkpoints that SLURM's jobs leave beside the runs


@dataclass(frozen=True)
class Splits:
    """The images of each split.

    Attributes:
        names: Names of the images of each split, including those that are left out.
        rows: Rows of the images of each split in the images of its source, int64 [N], without
            those that are left out.
        val_source: The split that validation images are taken from: "train" if they are held out,
            "val" if the data have their own, "test" if `val_fraction` is 0.
        sources: The split of the data whose images `rows` counts, for each split: "train" also for
            test images that are held out.
        record: Names that the earlier run recorded, or None in a new run.
        num_companions: New images of a group with some that are held out; they are in no split.
    """

    names: Names
    rows: dict[Split, np.ndarray]
    val_source: Split
    sources: dict[Split, Split]
    record: Names | None = None
    num_companions: int = 0

    def changes(self) -> str | None:
        """Say what has changed since the earlier run recorded its images; None if nothing has."""
        if self.record is None:
            return None
        present = _all_names(self.names)
        recorded = _all_names(self.record)
        new = len(present - recorded)
        gone = len(recorded - present)
        if not new and not gone and not self.num_companions:
            return None
        text = (
            f"The images have changed since the run began: {new:,} are new and {gone:,} are gone. "
            f"Validation stays with those of its images that are left."
        )
        if self.num_companions:
            text += (
                f" {self.num_companions:,} more are copies of images that are held out, or of one "
                f"group with them, and are left aside."
            )
        return text

    def left_out(self) -> str:
        """Say how many images of each split are left out."""
        counts = []
        for split, names in self.names.items():
            left_out = len(names) - len(self.rows[split])
            counts.append(f"{left_out:,} of {len(names):,} {split}")
        return ", ".join(counts)

    def write(self, folder: Path, group: str | None = None) -> str:
        """Record in a run's folder which image is in which split; missing ones stay recorded.

        Args:
            folder: The folder.
            group: The regular expression that groups images, if there is one.

        Returns:
            The identifier of the run, which is that of the record before if there is one.
        """
        present = _all_names(self.names)
        record: Names = {}
        for split in SPLITS:
            record[split] = list(self.names.get(split, []))
            if self.record is not None:
                record[split] += [name for name in self.record[split] if name not in present]
        run = run_of(folder) or secrets.token_hex(8)
        # ASCII: JSON escapes everything else.
        content = json.dumps({RUN_KEY: run, GROUP_KEY: group, **record}).encode()
        with atomic_write(folder / RECORD) as file:
            file.write(gzip.compress(content, mtime=0))
        return run


def choose_splits(
    names: Mapping[Split, Sequence[str]],
    labels: Mapping[Split, np.ndarray],
    val_fraction: float,
    seed: int,
    record: Names | None = None,
    leave_out: str | None = None,
    leave_out_splits: Collection[Split] = SPLITS,
    test_fraction: float = 0.0,
    group_keys: GroupKeys | None = None,
) -> Splits:
    """Choose validation and test images, and leave out the images that a list names.

    Args:
        names: Names of the images that the data have.
        labels: Their labels, int64 [N] for each split.
        val_fraction: Share of the training images to hold out, in [0, 1); see `hold_out`.
        seed: Seed of `hold_out`.
        record: Splits of an earlier run. Its validation images, and no others, are validated on.
        leave_out: Path of a CSV; see `read_image_list`.
        leave_out_splits: The splits that listed images are left out of.
        test_fraction: Share of the training images to hold out for the test, in [0, 1), if the data
            have no test images. They are the same for each seed, so that runs can be compared.
        group_keys: Tells which training images stay together. None: each is by itself.

    Raises:
        UserError: There is nothing to validate on, or `leave_out` does not fit these images.
    """
    holds_out_test = test_fraction > 0 and "train" in names and "test" not in names
    val_source = _val_source(names, val_fraction, holds_out_test)
    fractions: dict[Split, float] = {}  # of the training images, for what is held out of them
    sources: dict[Split, Split] = {"train": "train", "val": val_source, "test": "test"}
    if holds_out_test:
        fractions["test"] = test_fraction
        sources["test"] = "train"
    if val_source == "train":
        fractions["val"] = val_fraction
    if val_source == "test":
        sources["val"] = sources["test"]

    train_names = names.get("train", [])
    if record is None:
        train_labels = labels.get("train", np.zeros(0, np.int64))
        parts = _chosen_parts(train_names, train_labels, fractions, seed, group_keys)
    else:
        parts = _recorded_parts(train_names, fractions, record, group_keys)
    num_companions = len(train_names) - sum(map(len, parts.values()))
    if val_source == "test" and holds_out_test:
        parts["val"] = parts["test"]

    rows: dict[Split, np.ndarray] = {}
    split_names: Names = {}
    for split, source in sources.items():
        if source in names:
            rows[split] = _rows(split, source, names, parts, record)
            split_names[split] = [names[source][row] for row in rows[split]]
    if leave_out is not None:
        remaining_rows = rows_left(split_names, leave_out, leave_out_splits)
        for split, remaining in remaining_rows.items():
            rows[split] = rows[split][remaining]
    return Splits(split_names, rows, val_source, sources, record, num_companions)


def _rows(
    split: Split,
    source: Split,
    names: Mapping[Split, Sequence[str]],
    parts: Mapping[Split, np.ndarray],
    record: Names | None,
) -> np.ndarray:
    """Return the rows of a split's images, int64, in those of the split that they come from."""
    if source == "train":
        return parts[split]
    if split == "val" and record is not None:
        return np.flatnonzero(_is_among(names[source], record["val"]))
    return np.arange(len(names[source]))


def _val_source(names: Collection[str], val_fraction: float, holds_out_test: bool) -> Split:
    if "val" in names or "train" not in names:  # an evaluation needs no training images
        return "val"
    if val_fraction > 0:
        return "train"
    if "test" in names or holds_out_test:
        return "test"
    raise UserError("There is nothing to validate on: set val_fraction or add a folder val/.")


def _chosen_parts(
    names: Sequence[str],
    labels: np.ndarray,
    fractions: Mapping[Split, float],
    seed: int,
    group_keys: GroupKeys | None,
) -> dict[Split, np.ndarray]:
    """Return the rows, int64, of the training images that are held out for each split, and left.

    Args:
        names: Names of the N training images.
        labels: Their labels, int64 [N].
        fractions: Share of the images to hold out, of those that are left, for each split.
        seed: Seed of the validation images.
        group_keys: As in `choose_splits`.
    """
    rows = np.arange(len(names))
    parts: dict[Split, np.ndarray] = {}
    if fractions:
        keys = _keys(names, group_keys)
        for split, fraction in fractions.items():
            hash_key = TEST_KEY if split == "test" else str(seed)
            row_keys = (keys[row] for row in rows.tolist())
            is_held_out = hold_out(row_keys, labels[rows], fraction, hash_key)
            parts[split] = rows[is_held_out]
            rows = rows[~is_held_out]
    parts["train"] = rows
    return parts


def _recorded_parts(
    names: Sequence[str],
    held_out_splits: Collection[Split],
    record: Names,
    group_keys: GroupKeys | None,
) -> dict[Split, np.ndarray]:
    """Return the rows, int64, of the training images that a run held out for each split, and left.

    Images that are new, and of a group with one that is held out, are in no split: to train on them
    would be to train on what is validated on.
    """
    is_left = np.ones(len(names), dtype=bool)
    parts: dict[Split, np.ndarray] = {}
    for split in held_out_splits:
        is_held_out = _is_among(names, record[split])
        parts[split] = np.flatnonzero(is_held_out)
        is_left &= ~is_held_out
    if held_out_splits and group_keys is not None:
        is_new = ~_is_among(names, _all_names(record))
        if is_new.any():
            keys = _keys(names, group_keys)
            held_out_keys = {keys[row] for row in np.flatnonzero(~is_left).tolist()}
            for row in np.flatnonzero(is_new).tolist():
                if keys[row] in held_out_keys:
                    is_left[row] = False
    parts["train"] = np.flatnonzero(is_left)
    return parts


def _keys(names: Sequence[str], group_keys: GroupKeys | None) -> Sequence[str]:
    """Return the text that decides for each training image on which side of the hold-out it is."""
    names_in_split = TextList(name.removeprefix("train/") for name in names)
    if group_keys is None:
        return names_in_split
    return group_keys(names_in_split)


def _is_among(names: Sequence[str], others: Collection[str]) -> np.ndarray:
    """Return whether each name is among others, bool [N]."""
    others = set(others)
    return np.array([name in others for name in names], dtype=bool)


def hold_out(keys: Iterable[str], labels: np.ndarray, fraction: float, hash_key: str) -> np.ndarray:
    """Choose images by a hash of their keys, so that adding or removing some moves no other.

    There is one exception: the lowest hash of each class is always held out, and the highest (also
    that of a class of one image or group) never.

    Args:
        keys: A text for each of N images, such as its class and name. Images with the same text are
            a group, of which all or none are held out.
        labels: Labels of the images, int64 [N].
        fraction: Share of the groups to hold out, in (0, 1). The number held out of n is off by
            about `sqrt(n * fraction)`.
        hash_key: Another one chooses other images.

    Returns:
        Whether each image is held out, bool [N].
    """
    digests = bytearray()
    for key in keys:
        encoded = key.encode(errors="surrogatepass")
        digests += blake2b(encoded, digest_size=8, key=hash_key.encode()).digest()
    hashes = np.frombuffer(digests, ">u8").astype(np.uint64)  # `isin` takes no other byte order
    held_out = hashes < fraction * 2.0**64
    by_class_then_hash = np.lexsort((hashes, labels))
    last = np.flatnonzero(np.diff(labels[by_class_then_hash], append=-1))
    first = np.concatenate(([0], last[:-1] + 1))
    held_out[np.isin(hashes, hashes[by_class_then_hash[first]])] = True
    held_out[np.isin(hashes, hashes[by_class_then_hash[last]])] = False
    return held_out


def read(checkpoint: str | Path, run: str | None, is_needed: bool = True) -> Names | None:
    """Return the splits that the run of a checkpoint recorded, or None if there is no record.

    The record of another run, near which the checkpoint may lie, is not used.

    Args:
        checkpoint: The file.
        run: Identifier of the run in the checkpoint; None if the run has recorded nothing.
        is_needed: Whether to warn if the record of the run is not found.

    Raises:
        UserError: A record is damaged.
    """
    if run is None:
        return None
    for folder in _folders_near(Path(checkpoint)):
        if run_of(folder) == run:
            return read_record(folder)
    if is_needed:
        rank_zero_warn(
            f"{checkpoint} lies outside of its run and has no record of its images: the validation "
            f"images are chosen anew by their names. They are the same unless images were added, "
            f"renamed or removed since the run began; then some may be images that it was trained "
            f"on."
        )
    return None


def read_record(folder: Path) -> Names | None:
    """Return the splits that are recorded in a run's folder, or None if there is no record.

    Raises:
        UserError: The record is damaged.
    """
    content = _content(folder)
    if content is None:
        return None
    try:
        return {split: [str(name) for name in content[split]] for split in SPLITS}
    except (KeyError, TypeError):
        raise _damaged(folder) from None


def run_of(folder: Path) -> str | None:
    """Return the identifier of the run that a folder has a record of, or None if it has none.

    Raises:
        UserError: The record is damaged.
    """
    content = _content(folder)
    if content is None:
        return None
    try:
        return str(content[RUN_KEY])
    except (KeyError, TypeError):
        raise _damaged(folder) from None


def _content(folder: Path) -> Any:
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        with open_regular(path) as file, gzip.open(file) as unpacked:
            return json.loads(unpacked.read())
    except (OSError, EOFError, zlib.error, ValueError):
        raise _damaged(folder) from None


def _damaged(folder: Path) -> UserError:
    return UserError(
        f"{folder / RECORD}, the record of which images were trained on, is damaged: restore it, "
        f"or remove it if the images are those that the run began with."
    )


def _folders_near(checkpoint: Path) -> list[Path]:
    """Return folders that may be the run of a checkpoint.

    A run has RUN/checkpoints/last.ckpt. SLURM's jobs leave theirs beside the folder of the runs.
    """
    checkpoint = checkpoint.resolve()
    folders = [checkpoint.parents[0]]
    if len(checkpoint.parents) > 1:
        folders.insert(0, checkpoint.parents[1])
    if checkpoint.name.startswith(REQUEUED):
        records = (checkpoint.parent / LOGS).rglob(RECORD)
        folders += [record.parent for record in records]
    return folders


def digest(names: Sequence[str]) -> str:
    """Return the number of names, and a checksum that tells them from others."""
    return f"{len(names):,} images ({zlib.crc32(json.dumps(names).encode()):08x})"


def list_digest(path: str) -> str:
    """Return the `digest` of the names that a CSV lists; errors are those of `read_image_list`."""
    return digest(sorted(read_image_list(path)))


def rows_left(
    names: Names, path: str, leave_out_splits: Collection[Split] = SPLITS
) -> dict[Split, np.ndarray]:
    """Return the rows, int64, of each split's images that remain without those that a CSV lists.

    Args:
        names: Names of the images of each split.
        path: The CSV.
        leave_out_splits: The splits that listed images are left out of. The others keep all.

    Raises:
        UserError: The CSV cannot be read, or lists no image of these splits, or all of one.
    """
    image_list = read_image_list(path)
    rows: dict[Split, np.ndarray] = {}
    listed = 0
    listed_elsewhere = 0
    for split, split_names in names.items():
        rows[split] = unlisted_rows(split_names, image_list)
        num_listed = len(split_names) - len(rows[split])
        if split not in leave_out_splits:
            listed_elsewhere += num_listed
            rows[split] = np.arange(len(split_names))
            continue
        listed += num_listed
        if split_names and not len(rows[split]):
            raise UserError(f"leave_out={path} lists all {split} images: list fewer.")
    if image_list and not listed and listed_elsewhere:
        raise UserError(
            f"leave_out={path} lists {listed_elsewhere:,} images, but none of the "
            f"{', '.join(leave_out_splits)} images: name their splits too, "
            f"leave_out_splits=[{','.join(SPLITS)}]."
        )
    if image_list and not listed:
        raise UserError(
            f"leave_out={path} lists none of these images, but, for example, {min(image_list)}: "
            f"it belongs to other data."
        )
    return rows


def _all_names(names: Names) -> set[str]:
    return set().union(*names.values())
