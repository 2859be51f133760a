"""Prediction: which files are found, what is printed, and the same from Python."""

import csv
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from itertools import count

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import quiet_trainer, write_images
from PIL import Image

from cifar_transfer import Classifier, TransferClassifier
from cifar_transfer.base.errors import UserError, one_sentence
from cifar_transfer.commands.embed import main as embed
from cifar_transfer.commands.predict import main
from cifar_transfer.data.geometry import to_float
from cifar_transfer.data.images import read_image
from cifar_transfer.inference.sources import find
from cifar_transfer.results.plots import DPI

NAMES = ["cat", "飞机", "$5 or $6", "a longer name"]


def save(model, path):
    """A checkpoint as Lightning writes it, without training."""
    trainer = quiet_trainer()
    trainer.strategy.connect(model)
    path.parent.mkdir(parents=True)
    trainer.save_checkpoint(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with a run of a LeNet-5 whose predictions differ much from image to image, and images."""
    folder = tmp_path_factory.mktemp("predict")
    torch.manual_seed(0)
    model = TransferClassifier("lenet5", "none", class_names=NAMES)
    model.network.classifier[-1].weight.data *= 20
    model.geometry = replace(model.geometry, size=(32, 32))
    save(model, folder / "lightning_logs" / "version_0" / "checkpoints" / "best.ckpt")
    write_images(folder / "photos", 4, size=(50, 40), classes=("b", "a"))
    pixels = np.random.default_rng(1).integers(0, 256, (33, 70, 4), dtype=np.uint8)
    for name, image in {
        "palette.gif": Image.fromarray(pixels[..., :3]).convert("P"),
        "alpha.png": Image.fromarray(pixels),
        "grey.webp": Image.fromarray(pixels[..., 0]),
        "sixteen.png": Image.fromarray(pixels[..., 0].astype(np.uint16) * 257),
        "cmyk.jpg": Image.fromarray(pixels, mode="CMYK"),
    }.items():
        image.save(folder / name)
    (folder / "broken.png").write_bytes((folder / "alpha.png").read_bytes()[:500])
    return folder


@pytest.fixture(scope="module")
def classifier(run):
    return Classifier.load(
        run / "lightning_logs" / "version_0" / "checkpoints" / "best.ckpt", "cpu"
    )


@pytest.fixture
def here(run, monkeypatch):
    monkeypatch.chdir(run)
    return run


def found(*names):
    refused = []
    return list(find(names, refused.append)), [str(error) for error in refused]


def test_files_folders_patterns_and_lists_are_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (
        "d/b/2.png",
        "d/b/1.JPG",
        "d/a/x/3.webp",
        "d/z.png",
        "d/.hidden/4.png",
        "d/._z.png",
        "d/labels.txt",
        "[5].png",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "d" / "b" / "circle").symlink_to(tmp_path / "d" / "b")
    (tmp_path / "empty").mkdir()
    folder = ["d/a/x/3.webp", "d/b/1.JPG", "d/b/2.png", "d/z.png"]
    assert found("d") == (folder, [])
    assert found("d/*") == ([*folder[:3], "d/labels.txt", "d/z.png"], []), (
        "as the shell and then a folder"
    )
    assert found("d/a/**/*.webp", "[5].png", "gone.png") == (
        ["d/a/x/3.webp", "[5].png", "gone.png"],
        [],
    )
    assert found("d/a/**") == (["d/a/x/3.webp"], [])
    listed = io.TextIOWrapper(io.BytesIO(b"d/a\r\n\nwith space .png\ncaf\xe9.png\n"))
    monkeypatch.setattr("sys.stdin", listed)
    assert found("-") == (["d/a/x/3.webp", "with space .png", os.fsdecode(b"caf\xe9.png")], [])
    paths, refused = found("https://example.org/a.png", "d/*.bmp", "empty", "[5].png")
    assert paths == ["[5].png"]
    for part, sentence in zip(
        ("is a URL.*download it first", "matches no file", "has no images"), refused, strict=True
    ):
        assert re.search(part, sentence)


def test_json_agrees_with_the_network_for_images_of_every_mode(here, classifier, capsys):
    images = [
        "photos/a/000.png",
        "palette.gif",
        "alpha.png",
        "grey.webp",
        "sixteen.png",
        "cmyk.jpg",
        "photos",
    ]
    assert main([*images, "--format=json", "--top_k=9", "--batch_size=3", "--accelerator=cpu"]) == 0
    printed = capsys.readouterr()
    predictions = json.loads(printed.out)
    assert "lightning_logs/version_0/checkpoints/best.ckpt" in printed.err
    paths = [*images[:-1], *(f"photos/{c}/{i:03d}.png" for c in "ab" for i in range(4))]
    assert [prediction["image"] for prediction in predictions] == paths
    batch = torch.stack([torch.from_numpy(read_image(path, (32, 32))) for path in paths])
    with torch.no_grad():
        expected = classifier.model(to_float(batch)).softmax(1)
        model = TransferClassifier.load_from_checkpoint(
            "lightning_logs/version_0/checkpoints/best.ckpt"
        ).eval()
        assert torch.equal(model(to_float(batch)).softmax(1), expected), "to the bit"
    assert expected.argmax(1).unique().numel() > 1, "a test that can tell images apart"
    for prediction, row in zip(predictions, expected, strict=True):
        assert [p for _, p in prediction["classes"]] == pytest.approx(
            row.sort(descending=True).values.tolist(), abs=1e-5
        )
        assert prediction["classes"][0][0] == NAMES[int(row.argmax())]


def test_table_and_csv_say_what_json_says(here, capsys):
    printed = {}
    for kind in ("json", "table", "csv"):
        assert main(["photos", "--top_k=2", f"--format={kind}"]) == 0
        printed[kind] = capsys.readouterr().out
    predictions = json.loads(printed["json"])
    rows = list(csv.DictReader(io.StringIO(printed["csv"])))
    assert [
        (row["image"], int(row["rank"]), row["class"], float(row["probability"])) for row in rows
    ] == [
        (prediction["image"], rank, name, share)
        for prediction in predictions
        for rank, (name, share) in enumerate(prediction["classes"], 1)
    ]
    lines = printed["table"].splitlines()
    for line, prediction in zip(lines, predictions, strict=True):
        assert line.split("%")[-1] == f"  {prediction['image']}"
        assert [part.split()[-1] for part in line.split("%")[:-1]] == [
            f"{100 * p:.1f}" for _, p in prediction["classes"]
        ]
    wide = [sum(2 if "一" <= c <= "龥" else 1 for c in line.rpartition("%")[0]) for line in lines]
    assert len(set(wide)) == 1, "columns line up, and a Chinese letter takes two"


def test_what_cannot_be_read_is_named_and_skipped(here, capsys):
    images = [
        "broken.png",
        "photos/a/000.png",
        "gone.png",
        "https://example.org/a.png",
        "photos/a/001.png",
    ]
    assert main([*images, "--format=json", "--batch_size=2"]) == 1
    printed = capsys.readouterr()
    assert [prediction["image"] for prediction in json.loads(printed.out)] == [
        "photos/a/000.png",
        "photos/a/001.png",
    ]
    errors = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 3
    for part in (
        "broken.png cannot be decoded",
        "gone.png does not exist",
        "example.org/a.png is a URL",
    ):
        assert sum(part in error for error in errors) == 1
    assert main(["gone.png", "--format=json"]) == 1
    assert json.loads(capsys.readouterr().out) == []


def test_a_list_of_any_length_is_read_only_two_batches_ahead(run, classifier):
    taken = count()
    endless = (str(run / "alpha.png") for _ in taken)
    predictions = classifier.stream(endless, batch_size=5)
    for _ in range(11):
        next(predictions)
    assert next(taken) <= 20


def test_without_a_checkpoint_the_newest_runs_is_taken(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"--ckpt, or train with python -m cifar_transfer\.fit"):
        main(["x.png"])
    for number, age in (("2", 10), ("10", 20), ("9", 30)):
        path = tmp_path / "lightning_logs" / f"version_{number}" / "checkpoints" / "best.ckpt"
        path.parent.mkdir(parents=True)
        path.write_bytes(
            (run / "lightning_logs" / "version_0" / "checkpoints" / "best.ckpt").read_bytes()
        )
        os.utime(path, (1e9 - age, 1e9 - age))
    assert main([str(run / "alpha.png")]) == 0
    assert "lightning_logs/version_2/checkpoints/best.ckpt" in capsys.readouterr().err


def test_one_image_has_one_answer_in_whatever_form_it_comes(run, classifier):
    pixels = np.asarray(Image.open(run / "photos" / "a" / "000.png"))
    tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    path = run / "photos" / "a" / "000.png"
    expected = classifier.predict(path)
    assert [type(part) for part in expected[0]] == [str, float]
    assert sum(share for _, share in expected) == pytest.approx(1)
    for image in (str(path), Image.open(path), pixels, tensor, tensor / 255):
        assert classifier.predict(image) == expected
    several = classifier.predict([run / "alpha.png", pixels], top_k=1)
    assert [len(row) for row in several] == [1, 1]
    assert several[1][0] == (expected[0][0], pytest.approx(expected[0][1], abs=1e-5))
    assert classifier.predict([]) == []


@pytest.mark.parametrize(
    ("image", "part"),
    [
        (np.zeros((8, 8, 3)), "ndarray float64"),
        (np.zeros((3, 8, 8), np.uint8), r"ndarray uint8 \(3, 8, 8\)"),
        (np.zeros((8, 0, 3), np.uint8), r"\(8, 0, 3\)"),
        (torch.zeros(8, 8, 3), "Tensor torch.float32"),
        (torch.full((3, 8, 8), 255.0), "floats in"),
        (torch.full((3, 8, 8), float("nan")), "floats in"),
        (7, "not this int"),
        ("gone.png", "gone.png does not exist"),
    ],
)
def test_what_is_no_image_is_refused(classifier, image, part):
    with pytest.raises(UserError, match=part):
        classifier.predict(image)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--top_k=0"], "top_k is 0"),
        (["--batch_size=-1"], "batch_size is -1"),
        (["--accelerator=tpu"], "There is no accelerator 'tpu'"),
        (["--figure=gone/x.png"], "in a folder that exists"),
        (["--figure=x.txt"], "ends in .png"),
        (["--explain=alpha.png"], "cannot be made a folder"),
        (["--ckpt=gone.ckpt"], "gone.ckpt does not exist"),
        (["--ckpt=alpha.png"], "cannot be read as a checkpoint"),
    ],
)
def test_mistakes_get_a_sentence(here, capsys, options, message):
    with pytest.raises(SystemExit, match=r"^2$"), one_sentence():
        main(["photos", *options])
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err.splitlines()[-1]


def test_a_list_comes_in_and_a_reader_may_leave(here, tmp_path):
    """The command itself, between a file and a pipe."""
    command = [
        sys.executable,
        "-m",
        "cifar_transfer",
        "predict",
        "-",
        "--format=csv",
        "--batch_size=2",
    ]
    (tmp_path / "list").write_text("photos/a/000.png\n" * 100_000)
    timed = os.environ | {"PYTHONPROFILEIMPORTTIME": "1"}
    with (tmp_path / "list").open() as listed, (tmp_path / "errors").open("w") as errors:
        process = subprocess.Popen(
            command, stdin=listed, stdout=subprocess.PIPE, stderr=errors, env=timed
        )
    with process:
        assert process.stdout.readline() == b"image,rank,class,probability\n"
        process.stdout.close()
    errors = (tmp_path / "errors").read_text()
    assert "Traceback" not in errors
    assert "version_0" in errors
    imported = {
        line.rpartition("|")[2].strip()
        for line in errors.splitlines()
        if line.startswith("import time:")
    }
    assert "torchvision" in imported
    assert not imported & {"lightning", "torchmetrics", "matplotlib", "tensorboard"}, (
        "which take seconds"
    )


def test_figure_and_heat_maps_are_written(here, tmp_path, capsys):
    options = [
        "--top_k=2",
        f"--figure={tmp_path / 'f.png'}",
        f"--explain={tmp_path / 'new' / 'maps'}",
    ]
    assert main(["photos/a/003.png", "broken.png", "alpha.png", *options]) == 1
    assert sorted(path.name for path in (tmp_path / "new" / "maps").iterdir()) == [
        "00001-003.png",
        "00002-alpha.png",
    ]
    for path in (tmp_path / "f.png", *(tmp_path / "new" / "maps").iterdir()):
        with Image.open(path) as picture:
            assert picture.width >= 4 * DPI
            assert np.asarray(picture.convert("L")).std() > 5, "not an empty page"


def test_features_are_what_comes_into_the_head(here, classifier, tmp_path, capsys):
    images = ["photos/b", "broken.png", "alpha.png", "gone.png", "photos/a"]
    files = [tmp_path / "features.npz", tmp_path / "features.parquet"]
    for file in files:
        assert embed([*images, f"--out={file}", "--batch_size=3"]) == 1
    told = capsys.readouterr().err
    assert all(
        told.count(part) == 2
        for part in ("broken.png cannot be decoded", "gone.png does not exist")
    )
    names = (
        [f"photos/b/{i:03d}.png" for i in range(4)]
        + ["alpha.png"]
        + [f"photos/a/{i:03d}.png" for i in range(4)]
    )
    batch = torch.stack([torch.from_numpy(read_image(name, (32, 32))) for name in names])
    head, seen = classifier.model.network.classifier[-1], []
    hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        logits = classifier.model(to_float(batch))
    hook.remove()
    expected = [NAMES[label] for label in logits.argmax(1).tolist()]
    with np.load(files[0], allow_pickle=False) as arrays:
        assert sorted(arrays) == ["features", "names", "predicted"]
        assert arrays["names"].tolist() == names
        assert arrays["predicted"].tolist() == expected
        assert arrays["features"].dtype == np.float32
        np.testing.assert_allclose(arrays["features"], seen[0].numpy(), rtol=1e-4, atol=1e-5)
        columns = pq.read_table(files[1]).to_pydict()
        assert columns == {
            name: arrays[name].tolist() for name in ("names", "features", "predicted")
        }


def test_the_projector_shows_each_image_among_its_features(here, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("cifar_transfer.commands.embed.PROJECTED", 5)
    strange = tmp_path / "tab\tand\nline.png"
    strange.write_bytes((here / "alpha.png").read_bytes())
    options = [
        f"--out={tmp_path / 'f.npz'}",
        f"--projector={tmp_path / 'new' / 'board'}",
        "--batch_size=2",
    ]
    assert embed([str(strange), "broken.png", "photos", *options]) == 1
    told = capsys.readouterr().out
    assert f"tensorboard --logdir {tmp_path / 'new' / 'board'}" in told
    kept = np.load(tmp_path / "f.npz")
    [points] = (tmp_path / "new" / "board").rglob("tensors.tsv")
    np.testing.assert_allclose(np.loadtxt(points, delimiter="\t"), kept["features"][:5], rtol=1e-5)
    heading, *lines = points.with_name("metadata.tsv").read_text().splitlines()
    assert heading == "class\timage"
    names = [rf"{tmp_path}/tab\tand\nline.png", *kept["names"][1:5]]
    assert lines == [f"{c}\t{name}" for c, name in zip(kept["predicted"][:5], names, strict=True)]
    with Image.open(points.with_name("sprite.png")) as sprite:
        assert sprite.size == (3 * 32, 3 * 32)
        shown = np.asarray(sprite)[:32, 32:64]
    np.testing.assert_allclose(shown, read_image(names[1], (32, 32)).transpose(1, 2, 0), atol=1)
    config = (tmp_path / "new" / "board" / "projector_config.pbtxt").read_text()
    assert str(points.relative_to(tmp_path / "new" / "board")) in config
    with pytest.raises(UserError, match="board is there already: name a new folder"):
        embed(["photos", *options])
    with pytest.raises(
        UserError, match=r"alpha\.png is no folder: name another place with --projector"
    ):
        embed(["photos", options[0], f"--projector={here / 'alpha.png' / 'board'}"])


def test_the_projector_takes_images_that_are_high(here, tmp_path, classifier):
    portrait = tmp_path / "runs" / "portrait.ckpt"
    model = TransferClassifier("lenet5", "none", class_names=NAMES, image_size=32)
    model.geometry = replace(model.geometry, size=(60, 40))
    save(model, portrait)
    options = [
        f"--out={tmp_path / 'f.npz'}",
        f"--projector={tmp_path / 'board'}",
        f"--ckpt={portrait}",
    ]
    assert embed(["photos", *options]) == 0
    [sprite] = (tmp_path / "board").rglob("sprite.png")
    with Image.open(sprite) as picture:
        assert picture.size == (3 * 32, 3 * 32)
        seen = np.asarray(picture)[:32, :32]
    assert seen[:, :21].std() > 5
    assert seen[:, 21:].max() == 0
    with pytest.raises(UserError, match="is there already: name a new folder"):
        embed(["photos", f"--out={tmp_path / 'e.npz'}", f"--projector={tmp_path / 'e.npz'}"])


@pytest.mark.parametrize("images", ["photos", "photos/a/000.png"])
def test_a_figure_does_not_replace_an_image(here, tmp_path, images):
    before = (here / "photos" / "a" / "000.png").read_bytes()
    with pytest.raises(UserError, match="is one of the images, and would replace it"):
        main([images, f"--figure={here / 'photos' / 'a' / '000.png'}"])
    assert (here / "photos" / "a" / "000.png").read_bytes() == before


def test_a_folder_is_no_checkpoint(here):
    with pytest.raises(
        UserError, match=r"version_0 is a folder: a run keeps its own in RUN/checkpoints/best\.ckpt"
    ):
        main(["alpha.png", "--ckpt=lightning_logs/version_0"])


def test_a_name_that_is_no_text_is_escaped_in_parquet_and_whole_in_npz(here, tmp_path):
    image = tmp_path / os.fsdecode(b"caf\xe9.png")
    image.write_bytes((here / "alpha.png").read_bytes())
    for file in (tmp_path / "f.npz", tmp_path / "f.parquet"):
        assert embed([str(image), f"--out={file}"]) == 0
    assert np.load(tmp_path / "f.npz")["names"].tolist() == [str(image)]
    assert pq.read_table(tmp_path / "f.parquet")["names"].to_pylist() == [
        f"{tmp_path}/caf\\udce9.png"
    ]


def test_features_that_cannot_be_written_are_refused_before_and_what_was_there_stays(
    here, tmp_path, monkeypatch
):
    (tmp_path / "folder.npz").mkdir()
    for out in ("f.csv", "gone/f.npz", "folder.npz"):
        with pytest.raises(
            UserError, match=r"--out .*: name a file that ends in \.npz or \.parquet, in a folder"
        ):
            embed(["photos", f"--out={tmp_path / out}", "--ckpt=gone.ckpt"])
    file = tmp_path / "f.npz"
    file.write_text("before")
    with pytest.raises(UserError, match=r"gone\.ckpt does not exist"):
        embed(["photos", f"--out={file}", "--ckpt=gone.ckpt"])
    assert embed(["gone.png", f"--out={file}"]) == 1
    monkeypatch.setattr(np, "savez", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError, match="division"):
        embed(["photos", f"--out={file}"])
    assert file.read_text() == "before"
    monkeypatch.setattr("cifar_transfer.commands.embed.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install pyarrow, or name a file that ends in \.npz"):
        embed(["photos", f"--out={tmp_path / 'f.parquet'}"])
