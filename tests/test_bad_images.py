"""Damaged files, images as phones and scanners write them, and folders as people keep them."""

import csv
import io
import json
import os
import random
import re
import struct
import zlib
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from conftest import run_fit, write_images
from PIL import Image

from cifar_transfer import Classifier, ImageFolderDataModule, ShapesDataModule, TransferClassifier
from cifar_transfer.base.errors import UserError
from cifar_transfer.base.text import printable
from cifar_transfer.commands.fit import fit
from cifar_transfer.commands.predict import main
from cifar_transfer.data import exact_duplicates
from cifar_transfer.data.images import MAX_MEGAPIXELS, read_image
from cifar_transfer.data.left_aside import LeftAside
from cifar_transfer.data.listing import images_below

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
PHOTO = Image.fromarray(
    np.kron(PIXELS[:3, :5], np.ones((8, 8, 1), np.uint8))
)  # blocks, which JPEG keeps well
FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM")


def encoded(image, kind, **options):
    """Return the image as the bytes of a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_of(width, height):
    """Return the beginning of a PNG file that claims a size, without its pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    ends = struct.pack(">I", zlib.crc32(header)) + struct.pack(">I", 1000) + b"IDAT" + b"x" * 1000
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + ends


def ready(root, **options):
    data = ImageFolderDataModule(str(root), **options)
    data.prepare_data()
    data.setup()
    return data


UNREADABLE = {
    **{f"truncated {kind}": encoded(PHOTO, kind)[:-60] for kind in FORMATS},
    "of zero bytes": b"",
    "a text": b"I am a text, not an image.\n",
    "a page instead of an image": b"<!DOCTYPE html><title>404</title>",
    "a program, which Ghostscript would run": encoded(PHOTO, "EPS"),
    "all zeros": bytes(5000),
    "of one side zero": b"P6 0 5 255\n",
}


@pytest.mark.parametrize("content", UNREADABLE.values(), ids=UNREADABLE.keys())
def test_a_file_that_is_no_image_is_named_in_one_sentence(tmp_path, content):
    path = tmp_path / "cat.jpg"
    path.write_bytes(content)
    message = rf"^{re.escape(str(path))} cannot be decoded as an image .*mend or remove it\.$"
    with pytest.raises(UserError, match=message) as error:
        read_image(path)
    assert str(error.value).count(str(path)) == 1


@pytest.mark.parametrize("kind", FORMATS)
def test_a_damaged_file_is_decoded_or_refused_in_a_sentence(tmp_path, kind):
    """A hundred damaged files: bytes are replaced, cut out, doubled or zeroed."""
    whole = encoded(PHOTO, kind)
    chance = random.Random(0)
    refused = []
    for _ in range(100):
        content = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(min(len(content), chance.choice([64, 512, 10**6])))
            length = chance.choice([1, 1, 1, 8, 200])
            part = content[at : at + length]
            content[at : at + length] = chance.choice(
                [chance.randbytes(len(part)), b"", 2 * part, bytes(len(part))]
            )
        path = tmp_path / f"x.{kind}"
        path.write_bytes(content)
        try:
            image = read_image(path, (32, 32), max_megapixels=1)
        except UserError as error:
            refused.append(str(error))
        else:
            assert (image.shape, image.dtype) == ((3, 32, 32), np.uint8)
    assert len(refused) > 3, "some of the damage matters"
    assert all(message.startswith(str(path)) for message in refused)


def test_a_program_is_not_run_to_draw_an_image(tmp_path):
    (tmp_path / "x.png").write_bytes(encoded(PHOTO, "EPS"))
    with pytest.raises(
        UserError, match="a program, which is not run"
    ):  # by Ghostscript, where that is installed
        read_image(tmp_path / "x.png")


def test_the_contents_tell_the_format_not_the_name(tmp_path):
    (tmp_path / "a.jpg").write_bytes(encoded(Image.fromarray(PIXELS), "PNG"))
    assert np.array_equal(read_image(tmp_path / "a.jpg").transpose(1, 2, 0), PIXELS)


def test_cmyk_sixteen_bit_images_and_animations_are_read_as_they_look(tmp_path):
    frames = [PHOTO, PHOTO.rotate(180)]
    sixteen = Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257)
    for name, content, wanted, close in (
        ("cmyk.jpg", encoded(PHOTO.convert("CMYK"), "JPEG", quality=95), np.asarray(PHOTO), 25),
        ("sixteen.png", encoded(sixteen, "PNG"), PIXELS[..., :1], 0),
        ("sixteen.tif", encoded(sixteen, "TIFF"), PIXELS[..., :1], 0),
        (
            "animated.gif",
            encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
            np.asarray(PHOTO),
            0,
        ),
        (
            "animated.png",
            encoded(frames[0], "PNG", save_all=True, append_images=frames[1:]),
            np.asarray(PHOTO),
            0,
        ),
        (
            "animated.webp",
            encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True),
            np.asarray(PHOTO),
            0,
        ),
        ("one.png", encoded(PHOTO.crop((0, 0, 1, 1)), "PNG"), np.asarray(PHOTO)[:1, :1], 0),
    ):
        (tmp_path / name).write_bytes(content)
        image = read_image(tmp_path / name).transpose(1, 2, 0).astype(int)
        assert np.abs(image - wanted).max() <= close, name
    assert read_image(tmp_path / "one.png", (32, 32)).shape == (3, 32, 32)


def turned(orientation):
    """Return `PHOTO` as a camera that is held otherwise stores it, and its EXIF data."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # numbers of Pillow's Transpose
    return PHOTO.transpose(undo[orientation]) if orientation in undo else PHOTO, exif


@pytest.mark.filterwarnings("ignore:.*held-out val images are also among those of training")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_images_are_turned_upright_in_training_and_prediction(tmp_path, kind):
    write_images(tmp_path / "train", 2, size=PHOTO.size)
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    for orientation in range(1, 9):
        image, exif = turned(orientation)
        (tmp_path / "train" / "cat" / f"{orientation}.png").write_bytes(
            encoded(image, kind, exif=exif, **options)
        )
    images = ready(tmp_path, val_fraction=0.5).load("train")
    seen = images.__getitems__([2, *range(3, 10)])[0].numpy().transpose(0, 2, 3, 1).astype(int)
    assert np.abs(seen - np.asarray(PHOTO)).max() <= (8 if kind == "JPEG" else 0)
    classifier = Classifier(TransferClassifier("lenet5", "none").classifier, "cpu")
    given = Image.open(tmp_path / "train" / "cat" / "6.png")
    shown = [
        next(classifier.stream([image])).pixels
        for image in (tmp_path / "train" / "cat" / "6.png", given)
    ]
    assert (
        np.array_equal(shown[0], read_image(tmp_path / "train" / "cat" / "1.png", (32, 32)))
        or kind == "JPEG"
    )
    assert np.array_equal(*shown), "also where the image comes from Python"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_an_exif_that_cannot_be_read_is_ignored(tmp_path, kind):
    for number, exif in enumerate(
        (b"rubbish", b"MM\0*\xff\xff\xff\xff", b"II*\0\x08\0\0\0\x09\0\x12")
    ):
        (tmp_path / f"{number}.jpg").write_bytes(encoded(PHOTO, kind, exif=b"Exif\0\0" + exif))
        assert read_image(tmp_path / f"{number}.jpg").shape == (3, 24, 40)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # as `images` does
def test_a_decompression_bomb_is_refused_undecoded_and_the_limit_can_be_raised(tmp_path):
    sides = {"between Pillow's warning and its error": 12_000, "above both": 20_000}
    for side in sides.values():
        path = tmp_path / f"{side}.png"
        path.write_bytes(png_of(side, side))
        with pytest.raises(
            UserError,
            match=rf"{side}\.png has more than 100 million pixels: .*raise max_megapixels",
        ):
            read_image(path)
        with pytest.raises(UserError, match="cannot be decoded"):  # there are no pixels in it
            read_image(path, max_megapixels=401)
        with pytest.raises(UserError, match="has more than 100 million"):  # the limit is back
            read_image(path)
    assert MAX_MEGAPIXELS == 100
    write_images(tmp_path / "train", 3, size=(50, 40))
    with pytest.raises(UserError, match=r"train/cat/000\.png has more than 0\.001 million pixels"):
        ready(tmp_path, max_megapixels=0.001)
    assert len(ready(tmp_path, max_megapixels=0.002).load("train")) == 6
    small = Classifier(TransferClassifier("lenet5", "none").classifier, "cpu", max_megapixels=0.001)
    with pytest.raises(UserError, match="max_megapixels"):
        small.predict(tmp_path / "train" / "cat" / "000.png")


def test_an_image_of_one_row_is_not_blown_up(tmp_path):
    # Enlarged as a whole it would have 3 thousand million pixels.
    Image.new("RGB", (60_000, 1), "red").save(tmp_path / "row.png")
    assert read_image(tmp_path / "row.png", (224, 224)).reshape(3, -1).mean(1).tolist() == [
        255,
        0,
        0,
    ]
    assert read_image(tmp_path / "row.png", (20, 30)).reshape(3, -1).mean(1).tolist() == [255, 0, 0]
    for width, height, size in ((40, 24, 32), (24, 39, 7), (300, 200, 224), (33, 32, 31)):
        image = PHOTO.resize((width, height))
        image.save(tmp_path / "x.png")
        scale = size / min(image.size)
        whole = image.resize(
            [max(size, round(side * scale)) for side in image.size], Image.Resampling.BILINEAR
        )
        left, top = (whole.width - size) // 2, (whole.height - size) // 2
        expected = np.asarray(whole.crop((left, top, left + size, top + size)), int).transpose(
            2, 0, 1
        )
        assert np.abs(read_image(tmp_path / "x.png", (size, size)) - expected).mean() < 6, (
            "half a pixel off at most"
        )


def test_only_images_are_taken_from_a_folder_and_each_once(tmp_path):
    write_images(tmp_path / "train", 3)
    cat = tmp_path / "train" / "cat"
    (cat / "more" / "yet more").mkdir(parents=True)
    (cat / "000.png").rename(cat / "more" / "yet more" / "IMG.PNG")
    (cat / "circle").symlink_to(cat)
    (cat / "self.png").symlink_to(cat / "self.png")
    (cat / "more" / "up").symlink_to(tmp_path)
    for name in (".DS_Store", "Thumbs.db", "._001.png", ".hidden.jpg", "notes.txt", "more/.png"):
        (cat / name).write_bytes(b"no image")
    os.mkfifo(cat / "pipe.png")
    (tmp_path / "train" / ".ipynb_checkpoints").mkdir()
    found = list(images_below(str(cat), lambda error: pytest.fail(str(error)), LeftAside()))
    names = [os.path.relpath(path, cat) for path in found if not path.startswith(f"{cat}/more/up")]
    assert names == ["001.png", "002.png", "more/yet more/IMG.PNG", "self.png"]
    with pytest.raises(UserError, match=r"self\.png cannot be read .*mend or remove it"):
        ready(tmp_path)
    (cat / "self.png").unlink()
    (cat / "more" / "up").unlink()
    data = ready(tmp_path, val_fraction=0.5)
    assert data.class_names == ["cat", "dog"]
    assert np.bincount(data.load("train").labels).tolist() == [3, 3]
    (cat / "gone.png").symlink_to("/nowhere.png")
    with pytest.raises(UserError, match=r"gone\.png cannot be read \(No such file"):
        ready(tmp_path)


def test_a_class_without_images_is_named(tmp_path):
    write_images(tmp_path / "train", 3, classes=("cat", "dog", "cow"))
    for path in (tmp_path / "train" / "cow").iterdir():
        path.rename(path.with_suffix(".txt"))
    with pytest.raises(UserError, match=r"train has no images of cow \(\.jpg .*remove the class"):
        ready(tmp_path)
    write_images(tmp_path / "test", 2, seed=1)
    for path in (tmp_path / "train" / "cow").iterdir():
        path.rename(path.with_suffix(".png"))
    assert len(ready(tmp_path).images["test"]) == 4, "a test may lack a class"


@pytest.mark.parametrize("where", ["cached", "on the fly"])
def test_images_in_both_training_and_test_are_counted(tmp_path, monkeypatch, where):
    monkeypatch.setattr(exact_duplicates, "BEGINNING_BYTES", 64)  # because the files are small
    write_images(tmp_path / "train", 8)
    write_images(tmp_path / "test", 8, seed=1)
    for number in (2, 5, 6):
        content = (tmp_path / "train" / "cat" / f"00{number}.png").read_bytes()
        (tmp_path / "test" / "dog" / f"00{number}.png").write_bytes(content)
    for split in ("train", "test"):  # two files of one size that differ at their end only
        content = bytearray(encoded(Image.fromarray(PIXELS).resize((32, 32)), "BMP"))
        content[-1] = split == "test"
        (tmp_path / split / "cat" / "x.bmp").write_bytes(content)
    options = {"cache_limit_gb": 0.0 if where == "on the fly" else 8.0}
    for _ in range(2):  # also when there is a cache already
        with pytest.warns(
            UserWarning, match="3 of 17 test images are also among those of training"
        ) as seen:
            ready(tmp_path, **options)
        messages = [str(warning.message) for warning in seen]
        (message,) = [message for message in messages if "among those" in message]
        assert f"{tmp_path}/test/dog/002.png is {tmp_path}/train/cat/002.png; " in message
        assert message.count("train/cat") == 2


STRANGE = (
    "two words",
    "it's",
    'a "quote"',
    "$5 or $6",
    "new\nline",
    "tab\t",
    os.fsdecode(b"caf\xe9"),
    "猫",
    "-x",
)


def predicted(*options):
    """Return what `predict` writes to standard output, in which any name can be written."""
    written = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="backslashreplace")
    with redirect_stdout(written):
        main(["my photos/test", *options])
        written.flush()
    return written.buffer.getvalue().decode()


@pytest.mark.whole
def test_names_that_are_no_text_do_not_stop_a_run_or_a_prediction(tmp_path, monkeypatch):
    """From training with figures to every format of prediction."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["fit"])
    rng = np.random.default_rng(0)
    for split, name in ((split, name) for split in ("train", "test") for name in STRANGE):
        folder = tmp_path / "my photos" / split / name
        folder.mkdir(parents=True)
        for number in range(4):
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(
                folder / f"{number} {name}.png"
            )
    options = [
        "--data=ImageFolderDataModule",
        "--data.root=my photos",
        "--trainer.max_epochs=1",
        "--model.weights=none",
    ]
    more = [
        "--model.backbone=lenet5",
        "--trainer.accelerator=cpu",
        "--freeze.unfreeze_epoch=0",
    ]
    assert fit([*options, *more]).best.is_file()
    listed = json.loads(predicted("--format=json", "--top_k=99"))
    assert len(listed) == 4 * len(STRANGE)
    assert all(os.path.isfile(prediction["image"]) for prediction in listed), (
        "names come out as they are"
    )
    assert {name for name, _ in listed[0]["classes"]} == {printable(name) for name in STRANGE}
    table = predicted("--figure=f.png", "--explain=maps")
    assert len(table.splitlines()) == 4 * len(STRANGE), "a line for each image"
    assert len(list(csv.DictReader(io.StringIO(predicted("--format=csv"))))) == 4 * len(STRANGE)
    broken = os.path.join("my photos", "train", STRANGE[4], f"{STRANGE[6]}.png")
    Path(broken).write_bytes(b"no image")
    error = run_fit(tmp_path, broken, command="predict", expect=1).stderr.splitlines()[-1]
    assert error.startswith("error: ")
    assert r"new\nline/caf\udce9.png cannot be decoded" in error


@pytest.mark.parametrize("wrong", [-1, 10, 2**40])
def test_a_label_that_is_no_class_is_refused_before_training(wrong, monkeypatch):
    load = ShapesDataModule.load

    def mislabelled(data, split):
        images = load(data, split)
        if split == "test":
            images.labels[7] = wrong
        return images

    monkeypatch.setattr(ShapesDataModule, "load", mislabelled)
    data = ShapesDataModule(train_images=40, test_images=20)
    with pytest.raises(
        UserError,
        match=rf"test images have labels from .*{wrong}.* classes are numbered from 0 to 9",
    ):
        data.setup()
