"""HEIC files, as phones write them."""

import numpy as np
import pytest
from conftest import write_images
from PIL import Image

from cifar_transfer import ImageFolderDataModule
from cifar_transfer.base.errors import UserError
from cifar_transfer.data import images
from cifar_transfer.data.images import EXTENSIONS, read_image, read_size

# The four quarters of an image, 32 x 48 pixels, each in a colour.
QUARTERS = np.kron(
    np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]], np.uint8),
    np.ones((16, 24, 1), np.uint8),
)


def test_what_heic_needs_is_said_where_it_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "READS_HEIC", False)
    (tmp_path / "a.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(200))
    if ".heic" not in EXTENSIONS:
        with pytest.raises(UserError, match=r"HEIC needs pillow-heif, pip install 'cifar-transfer"):
            read_image(tmp_path / "a.HEIC")
    (tmp_path / "a.png").write_bytes(b"rubbish")
    with pytest.raises(UserError, match="Pillow knows no such image"):
        read_image(tmp_path / "a.png")


def test_heic_is_read_upright_by_header_and_by_pixels(tmp_path):
    pytest.importorskip("pillow_heif", reason="pillow-heif is an optional extra")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    for name, turned in (("plain.heic", False), ("turned.HEIF", True)):
        options = {"exif": exif.tobytes()} if turned else {}
        Image.fromarray(QUARTERS).save(tmp_path / name, "HEIF", quality=-1, **options)
        expected = np.rot90(QUARTERS, -1) if turned else QUARTERS
        pixels = read_image(tmp_path / name).transpose(1, 2, 0)
        assert pixels.shape == expected.shape
        assert read_size(tmp_path / name) == expected.shape[:2]
        assert np.abs(pixels.astype(int) - expected)[4:-4, 4:-4].mean() < 8
    (tmp_path / "cut.heic").write_bytes((tmp_path / "plain.heic").read_bytes()[:-40])
    with pytest.raises(UserError, match=r"cut\.heic cannot be decoded as an image"):
        read_image(tmp_path / "cut.heic")


def test_heic_files_in_folders_are_images(tmp_path):
    pytest.importorskip("pillow_heif", reason="pillow-heif is an optional extra")
    write_images(tmp_path / "train", 4, (48, 32))
    for row in range(3):
        pixels = np.roll(QUARTERS, 3 * row, axis=1)
        Image.fromarray(pixels).save(tmp_path / "train" / "dog" / f"IMG_{row}.HEIC", "HEIF")
    data = ImageFolderDataModule(str(tmp_path), val_fraction=0.3)
    data.prepare_data()
    data.setup()
    assert sum(map(len, data.images.values())) == 11
