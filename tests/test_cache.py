"""The cache of decoded images: damaged, unwritable, on a full disk, and shared by two processes."""

import ctypes
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from conftest import write_images
from PIL import Image

from cifar_transfer import ImageFolderDataModule
from cifar_transfer.data.cache import CACHE_FOLDER, cached
from cifar_transfer.data.images import ArrayImages, FileImages

# Sets up a data module on the folder `photos`, and prints whether its images are decoded each time
# that they are read, and the sum of their pixels.
SETUP = """
import sys, warnings
from cifar_transfer import ImageFolderDataModule
from cifar_transfer.data import cache
{before}
data = ImageFolderDataModule("photos", num_workers=0)
data.prepare_data()
data.setup()
train = data.load("train")
print(train.on_the_fly, int(train.__getitems__(range(len(train)))[0].sum()))
"""


def start(folder, before="", **options):
    """Start `SETUP` in a process of its own."""
    environment = os.environ | options.pop("env", {})
    code = SETUP.format(before=before)
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment,
        text=True,
        **options,
        stdout=-1,
        stderr=-1,
    )


def finish(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    on_the_fly, total = out.split()
    return on_the_fly == "True", int(total), err


def ready(root):
    data = ImageFolderDataModule(str(root))
    data.prepare_data()
    data.setup()
    return data.load("train")


def all_images(images):
    """Return a copy of all pixels and labels."""
    pixels, labels = images.__getitems__(range(len(images)))
    return pixels.numpy().copy(), labels.numpy().copy()


def assert_equal_images(images, expected):
    assert np.array_equal(images[0], expected[0])
    assert np.array_equal(images[1], expected[1])


def flip(at):
    def damage(path):
        content = bytearray(path.read_bytes())
        content[at] ^= 0x10
        path.write_bytes(content)

    return damage


def zeros(path):
    content = bytearray(path.read_bytes())
    content[4096:8192] = bytes(4096)
    path.write_bytes(content)


class Bomb:
    def __reduce__(self):
        return open, ("bomb-went-off", "w")


DAMAGE = {
    "a bit of the pixels": ("npy", flip(-5000)),
    "a block of zeros": ("npy", zeros),
    "cut short": ("npy", lambda path: os.truncate(path, 9000)),
    "empty": ("npy", lambda path: os.truncate(path, 0)),
    "a pickle as pixels": ("npy", lambda path: path.write_bytes(pickle.dumps(Bomb()))),
    "an array of objects": (
        "npy",
        lambda path: np.save(path, np.array([Bomb()] * 20, object), allow_pickle=True),
    ),
    "an array of another kind": ("npy", lambda path: np.save(path, np.zeros((20, 3, 32, 32)))),
    "a bit of the labels": ("npz", flip(128 + 80)),
    "no labels": ("npz", Path.unlink),
    "labels cut short": ("npz", lambda path: os.truncate(path, 100)),
    "a pickle as labels": ("npz", lambda path: path.write_bytes(pickle.dumps(Bomb()))),
    "labels of objects": (
        "npz",
        lambda path: np.savez(
            path, labels=np.array([Bomb()] * 20, object), sums=np.zeros(20, np.uint32)
        ),
    ),
    "fewer labels": (
        "npz",
        lambda path: np.savez(path, labels=np.zeros(3, int), sums=np.load(path)["sums"]),
    ),
}


@pytest.mark.parametrize(("ending", "damage"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_cache_is_noticed_and_made_again(tmp_path, monkeypatch, ending, damage):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "train", 10)
    whole = all_images(ready(tmp_path))
    (path,) = (tmp_path / CACHE_FOLDER).glob(f"*.{ending}")
    stamp = os.stat(path)
    damage(path)
    if path.exists():  # damaged by the disk, which does not change the time
        os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    with pytest.warns(UserWarning, match="are damaged, and are made again"):
        made_again = all_images(ready(tmp_path))
    assert_equal_images(made_again, whole)
    assert not (tmp_path / "bomb-went-off").exists()
    with warnings.catch_warnings(action="error"):
        assert_equal_images(all_images(ready(tmp_path)), whole)


@pytest.mark.filterwarnings("ignore:The decoded images in")
def test_every_byte_before_the_pixels_may_be_damaged(tmp_path):
    """Whichever byte of the header is damaged, the images are right."""
    array = np.random.default_rng(0).integers(0, 256, (4, 3, 8, 8), dtype=np.uint8)
    labels = np.arange(4)
    for at in range(128):
        images = cached(tmp_path, "x", 0, lambda: ArrayImages(array, labels))
        assert np.array_equal(all_images(images)[0], array), at
        (path,) = (tmp_path / CACHE_FOLDER).glob("*.npy")
        flip(at)(path)


@pytest.mark.slow
def test_without_room_for_the_cache_images_are_decoded_on_the_fly(tmp_path):
    write_images(tmp_path / "photos" / "train", 40)  # 80 * 3072 bytes
    full = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"
    on_the_fly, total, stderr = finish(start(tmp_path, full))
    assert on_the_fly
    assert "not cached but decoded anew in each epoch" in stderr
    assert "File too large" in stderr
    remaining = sorted(path.name for path in (tmp_path / "photos" / CACHE_FOLDER).iterdir())
    assert set(remaining) <= {"train-checked.json", "train.lock"}, "no part of the cache"
    with_room = ready(tmp_path / "photos")
    assert not with_room.on_the_fly
    assert all_images(with_room)[0].sum() == total


def without_privileges():
    """Have the modes of files bind root too, from the next program on."""
    ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="root is bound by modes on Linux only")
@pytest.mark.parametrize("home", ["writable", pytest.param("read-only", marks=pytest.mark.whole)])
def test_a_folder_that_cannot_be_written_is_read(tmp_path, home):
    folder = tmp_path
    write_images(folder / "photos" / "train", 4)
    (folder / "home").mkdir()
    for path in (folder / "photos", folder / "home"):
        path.chmod(0o777 if path.name == "home" and home == "writable" else 0o555)
    env = {"XDG_CACHE_HOME": str(folder / "home"), "HOME": str(folder / "home")}
    on_the_fly, _, stderr = finish(start(folder, env=env, preexec_fn=without_privileges))
    assert on_the_fly == (home == "read-only")
    assert ("neither photos nor the user's cache can be written" in stderr) == (home == "read-only")
    assert bool(list((folder / "home").rglob("train-*.npy"))) == (home == "writable")
    assert not (folder / "photos" / CACHE_FOLDER).exists()


@pytest.mark.slow
def test_only_one_of_two_processes_decodes(tmp_path):
    write_images(tmp_path / "photos" / "train", 60)
    witness = """
write = cache._write
def witnessed(*args):
    with open("decodes", "a") as file:
        file.write("one\\n")
    import time
    time.sleep(0.5)  # until the other process waits
    write(*args)
cache._write = witnessed
"""
    both = [start(tmp_path, witness) for _ in range(2)]
    first, second = map(finish, both)
    assert first[:2] == second[:2]
    assert not first[0]
    assert (tmp_path / "decodes").read_text() == "one\n"


def replace_with_same_size_and_time(path, other):
    """Put another file's content in place of a file, with the size and the time that it had."""
    stamp = os.stat(path)
    content = other.read_bytes()
    padding = bytes(max(0, stamp.st_size - len(content)))
    replacement = path.with_name("replacement")
    replacement.write_bytes(content + padding)
    os.truncate(replacement, stamp.st_size)
    os.utime(replacement, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    replacement.rename(path)
    assert os.stat(path).st_size == stamp.st_size
    assert os.stat(path).st_mtime_ns == stamp.st_mtime_ns


def test_an_image_replaced_by_one_of_the_same_name_size_and_time_is_decoded_anew(tmp_path):
    """BMP files of one size in pixels have one size in bytes."""
    for kind, brightness in (("cat", 50), ("dog", 200)):
        (tmp_path / "train" / kind).mkdir(parents=True)
        for row in range(4):
            image = Image.new("RGB", (8, 8), (brightness + row,) * 3)
            image.save(tmp_path / "train" / kind / f"{row}.bmp")
    before = ready(tmp_path)
    assert all_images(before)[0][0].max() == 50
    path = tmp_path / "train" / "cat" / "0.bmp"
    replace_with_same_size_and_time(path, tmp_path / "train" / "dog" / "3.bmp")
    after = ready(tmp_path)
    assert all_images(after)[0][0].min() == 203


def test_an_uncached_image_replaced_by_one_of_the_same_name_size_and_time_has_another_mark(
    tmp_path,
):
    """Features on disk are kept by these marks."""
    for name, brightness in (("a", 50), ("b", 200)):
        Image.new("RGB", (8, 8), (brightness,) * 3).save(tmp_path / f"{name}.bmp")
    images = FileImages([str(tmp_path / "a.bmp")], np.zeros(1, np.int64), (8, 8))
    before = images.marks()
    replace_with_same_size_and_time(tmp_path / "a.bmp", tmp_path / "b.bmp")
    assert images.marks() != before
