"""Prediction: which files are taken, what is printed, and the same from Python. Also features."""

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
import pytest
import torch
from conftest import quiet_trainer, write_images
from PIL import Image

from cifar_transfer import Classifier, TransferClassifier
from cifar_transfer.base.errors import UserError, one_sentence
from cifar_transfer.commands.embed import main as embed
from cifar_transfer.commands.predict import main as predict
from cifar_transfer.data.geometry import to_float
from cifar_transfer.data.images import read_image
from cifar_transfer.inference.sources import image_files
from cifar_transfer.results.plots import DPI

NAMES = ["cat", "飞机", "$5 or $6", "a longer name"]
BEST = "lightning_logs/version_0/checkpoints/best.ckpt"
SIZE = (32, 32)


def save(module, path):
    """Write a checkpoint as Lightning does, without training."""
    trainer = quiet_trainer()
    trainer.strategy.connect(module)
    path.parent.mkdir(parents=True)
    trainer.save_checkpoint(path)


def set_size(module, size):
    """Let a network have been trained on images of a size."""
    classifier = module.classifier
    classifier.set_geometry(replace(classifier.geometry, size=size))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with images, and the run of a LeNet-5 that tells them apart."""
    folder = tmp_path_factory.mktemp("predict")
    torch.manual_seed(0)
    module = TransferClassifier("lenet5", "none", class_names=NAMES)
    module.network.classifier[-1].weight.data *= 20
    set_size(module, SIZE)
    save(module, folder / BEST)
    write_images(folder / "photos", 4, size=(50, 40), classes=("b", "a"))
    pixels = np.random.default_rng(1).integers(0, 256, (33, 70, 4), dtype=np.uint8)
    images = {
        "palette.gif": Image.fromarray(pixels[..., :3]).convert("P"),
        "alpha.png": Image.fromarray(pixels),
        "grey.webp": Image.fromarray(pixels[..., 0]),
        "sixteen.png": Image.fromarray(pixels[..., 0].astype(np.uint16) * 257),
        "cmyk.jpg": Image.fromarray(pixels, mode="CMYK"),
    }
    for name, image in images.items():
        image.save(folder / name)
    (folder / "broken.png").write_bytes((folder / "alpha.png").read_bytes()[:500])
    return folder


@pytest.fixture(scope="module")
def classifier(place):
    return Classifier.load(place / BEST, "cpu")


@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    return place


def files_of(*names):
    """Return the files that names stand for, and the sentences of errors."""
    errors = []
    files = list(image_files(names, errors.append))
    return files, [str(error) for error in errors]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of empty files, which is the current one."""
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
    return tmp_path


def test_a_classifier_is_printed_with_its_network_and_classes(place):
    classifier = Classifier.load(place / BEST, accelerator="cpu")
    assert repr(classifier) == (
        "Classifier(lenet5, 4 classes: cat, 飞机, $5 or $6, a longer name; 32 x 32 pixels, cpu)"
    )
    many = TransferClassifier("lenet5", "none", class_names=[f"class {n}" for n in range(9)])
    set_size(many, SIZE)
    assert ", class 4, ...; " in repr(Classifier(many.classifier, accelerator="cpu"))


def test_a_folder_stands_for_all_images_below_it(folder):
    files, errors = files_of("d")
    assert files == ["d/a/x/3.webp", "d/b/1.JPG", "d/b/2.png", "d/z.png"]
    assert errors == []


def test_a_pattern_stands_for_what_a_shell_would_find(folder):
    files, errors = files_of("d/*")
    assert files == ["d/a/x/3.webp", "d/b/1.JPG", "d/b/2.png", "d/labels.txt", "d/z.png"]
    assert errors == []
    assert files_of("d/a/**/*.webp") == (["d/a/x/3.webp"], [])
    assert files_of("d/a/**") == (["d/a/x/3.webp"], [])


def test_a_file_stands_for_itself_whether_it_exists_or_not(folder):
    assert files_of("[5].png", "gone.png") == (["[5].png", "gone.png"], [])


def test_standard_input_is_a_list_of_names(folder, monkeypatch):
    listed = io.TextIOWrapper(io.BytesIO(b"d/a\r\n\nwith space .png\ncaf\xe9.png\n"))
    monkeypatch.setattr("sys.stdin", listed)
    files, errors = files_of("-")
    assert files == ["d/a/x/3.webp", "with space .png", os.fsdecode(b"caf\xe9.png")]
    assert errors == []


def test_a_name_that_stands_for_nothing_is_an_error(folder):
    files, errors = files_of("https://example.org/a.png", "d/*.bmp", "empty", "[5].png")
    assert files == ["[5].png"]
    url, pattern, empty = errors
    assert re.search("is a URL.*download it first", url)
    assert "matches no file" in pattern
    assert "has no images" in empty


def test_json_agrees_with_the_network_for_images_of_every_mode(here, classifier, capsys):
    names = [
        "photos/a/000.png",
        "palette.gif",
        "alpha.png",
        "grey.webp",
        "sixteen.png",
        "cmyk.jpg",
    ]
    options = ["--format=json", "--top_k=9", "--batch_size=3", "--accelerator=cpu"]
    assert predict([*names, "photos", *options]) == 0
    printed = capsys.readouterr()
    predictions = json.loads(printed.out)
    assert BEST in printed.err
    files = [*names]
    for class_name in "ab":
        files += [f"photos/{class_name}/{number:03d}.png" for number in range(4)]
    assert [prediction["image"] for prediction in predictions] == files

    images = to_float(torch.stack([torch.from_numpy(read_image(file, SIZE)) for file in files]))
    module = TransferClassifier.load_from_checkpoint(BEST).eval()
    with torch.no_grad():
        expected = classifier.model(images).softmax(1)
        assert torch.equal(module(images).softmax(1), expected), "to the bit"
    assert expected.argmax(1).unique().numel() > 1, "the images are told apart"
    for prediction, row in zip(predictions, expected, strict=True):
        shares = [share for _, share in prediction["classes"]]
        assert shares == pytest.approx(row.sort(descending=True).values.tolist(), abs=1e-5)
        assert prediction["classes"][0][0] == NAMES[int(row.argmax())]


def test_an_image_and_its_mirror_image_are_predicted_together(here, classifier, tmp_path, capsys):
    image = Image.open("alpha.png").convert("RGB")
    image.save(tmp_path / "plain.png")
    image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "mirrored.png")
    shares = []
    for mirrored in ("false", "true"):
        options = [f"--mirrored={mirrored}", "--top_k=4", "--format=json"]
        predict([str(tmp_path / "plain.png"), str(tmp_path / "mirrored.png"), *options])
        predictions = json.loads(capsys.readouterr().out)
        shares.append([dict(prediction["classes"]) for prediction in predictions])
    (plain, mirror), (both, both_of_mirror) = shares
    assert both == pytest.approx(both_of_mirror, abs=1e-5)
    assert both == pytest.approx(
        {name: (plain[name] + mirror[name]) / 2 for name in NAMES}, abs=1e-5
    )
    assert max(abs(plain[name] - mirror[name]) for name in NAMES) > 1e-3
    loaded = Classifier.load(BEST, "cpu", mirrored=True)
    assert dict(loaded.predict(tmp_path / "plain.png")) == pytest.approx(both, abs=1e-5)


@pytest.fixture
def predicted(here, capsys):
    """Two classes of each photo, as the JSON has them, and a function for the other formats."""

    def run(kind):
        assert predict(["photos", "--top_k=2", f"--format={kind}"]) == 0
        return capsys.readouterr().out

    return json.loads(run("json")), run


def test_csv_says_what_json_says(predicted):
    predictions, run = predicted
    heading, *rows = csv.reader(io.StringIO(run("csv")))
    assert heading == ["image", "label", "probability", "label_2", "probability_2"]
    expected = []
    for prediction in predictions:
        cells = [prediction["image"]]
        for name, share in prediction["classes"]:
            cells += [name, f"{share:.6f}"]
        expected.append(cells)
    assert rows == expected


def test_the_table_says_what_json_says(predicted):
    predictions, run = predicted
    lines = run("table").splitlines()
    for line, prediction in zip(lines, predictions, strict=True):
        *classes, file = line.split("%")
        assert file == f"  {prediction['image']}"
        shares = [text.split()[-1] for text in classes]
        assert shares == [f"{100 * share:.1f}" for _, share in prediction["classes"]]


def test_the_columns_of_the_table_line_up(predicted):
    _, run = predicted
    widths = set()
    for line in run("table").splitlines():
        columns = line.rpartition("%")[0]
        chinese_letters = re.findall("[一-龥]", columns)
        widths.add(len(columns) + len(chinese_letters))  # a Chinese letter takes two columns
    assert len(widths) == 1


def test_below_a_threshold_the_answer_is_unknown_in_every_format(here, capsys):
    def run(kind, *options):
        assert predict(["photos", "--top_k=2", f"--format={kind}", *options]) == 0
        return capsys.readouterr().out

    plain = json.loads(run("json"))
    confidences = sorted(prediction["classes"][0][1] for prediction in plain)
    threshold = (confidences[3] + confidences[4]) / 2
    answers = []
    for prediction in plain:
        name, probability = prediction["classes"][0]
        answers.append(name if probability >= threshold else "unknown")
    assert answers.count("unknown") == 4

    option = f"--threshold={threshold}"
    found = json.loads(run("json", option))
    assert [prediction.pop("answer") for prediction in found] == answers
    assert found == plain, "the classes and their probabilities stay"
    heading, *rows = csv.reader(io.StringIO(run("csv", option)))
    assert heading == ["image", "label", "probability", "label_2", "probability_2", "answer"]
    assert [row[-1] for row in rows] == answers
    _, *plain_rows = csv.reader(io.StringIO(run("csv")))
    assert [row[:-1] for row in rows] == plain_rows
    lines = run("table", option).splitlines()
    plain_lines = run("table").splitlines()
    for line, plain_line, answer in zip(lines, plain_lines, answers, strict=True):
        assert line.endswith(f"  {plain_line}")
        assert line.removesuffix(plain_line).strip() == answer
    assert "unknown" not in run("csv", "--threshold=0")
    assert run("csv", "--threshold=1").count(",unknown\n") == len(plain)


@pytest.mark.parametrize("value", ["nan", "inf", "-0.1", "1.01", "80"])
def test_a_threshold_that_is_no_probability_is_refused(here, value):
    with pytest.raises(UserError, match=f"--threshold (is|takes .*not) {value}"):
        predict(["photos", f"--threshold={value}"])


def test_an_image_that_cannot_be_read_is_named_and_left_out(here, capsys):
    images = [
        "broken.png",
        "photos/a/000.png",
        "gone.png",
        "https://example.org/a.png",
        "photos/a/001.png",
    ]
    assert predict([*images, "--format=json", "--batch_size=2"]) == 1
    printed = capsys.readouterr()
    files = [prediction["image"] for prediction in json.loads(printed.out)]
    assert files == ["photos/a/000.png", "photos/a/001.png"]
    errors = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 3
    for part in (
        "broken.png cannot be decoded",
        "gone.png does not exist",
        "example.org/a.png is a URL",
    ):
        assert sum(part in error for error in errors) == 1
    assert predict(["gone.png", "--format=json"]) == 1
    assert json.loads(capsys.readouterr().out) == []


def test_a_list_of_any_length_is_read_only_two_batches_ahead(place, classifier):
    taken = count()
    endless = (str(place / "alpha.png") for _ in taken)
    predictions = classifier.stream(endless, batch_size=5)
    for _ in range(11):
        next(predictions)
    assert next(taken) <= 20


def test_without_a_checkpoint_that_of_the_newest_run_is_taken(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"--ckpt, or train with python -m cifar_transfer fit"):
        predict(["x.png"])
    for version, age in (("2", 10), ("10", 20), ("9", 30)):
        path = tmp_path / "lightning_logs" / f"version_{version}" / "checkpoints" / "best.ckpt"
        path.parent.mkdir(parents=True)
        path.write_bytes((place / BEST).read_bytes())
        os.utime(path, (1e9 - age, 1e9 - age))
    assert predict([str(place / "alpha.png")]) == 0
    assert "lightning_logs/version_2/checkpoints/best.ckpt" in capsys.readouterr().err


def test_an_image_has_the_same_classes_in_whatever_form_it_comes(place, classifier):
    path = place / "photos" / "a" / "000.png"
    pixels = np.asarray(Image.open(path))
    tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    expected = classifier.predict(path)
    name, share = expected[0]
    assert type(name) is str
    assert type(share) is float
    assert sum(share for _, share in expected) == pytest.approx(1)
    forms = (str(path), path.read_bytes(), Image.open(path), pixels, tensor, tensor / 255)
    for image in forms:
        assert classifier.predict(image) == expected


def test_several_images_have_a_list_each(place, classifier):
    path = place / "photos" / "a" / "000.png"
    [(name, share)] = classifier.predict(path, top_k=1)
    first, second = classifier.predict([place / "alpha.png", path], top_k=1)
    assert len(first) == 1
    assert second == [(name, pytest.approx(share, abs=1e-5))]
    assert classifier.predict([]) == []


@pytest.mark.parametrize(
    ("image", "part"),
    [
        (np.zeros((8, 8, 3)), "ndarray float64"),
        (np.zeros((3, 8, 8), np.uint8), r"ndarray uint8 \(3, 8, 8\)"),
        (np.zeros((8, 0, 3), np.uint8), r"\(8, 0, 3\)"),
        (torch.zeros(8, 8, 3), "Tensor torch.float32"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), "Tensor torch.int64"),
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
        (
            ["--ckpt=lightning_logs/version_0"],
            "is the folder of a run: name lightning_logs/version_0/checkpoints/best.ckpt",
        ),
    ],
)
def test_a_mistake_in_the_options_gets_a_sentence(here, capsys, options, message):
    with pytest.raises(SystemExit, match=r"^2$"), one_sentence():
        predict(["photos", *options])
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err.splitlines()[-1]


@pytest.mark.slow
def test_whoever_reads_the_output_may_leave(here, tmp_path):
    """The command itself, between a file with a list and a pipe."""
    (tmp_path / "list").write_text("photos/a/000.png\n" * 100_000)
    arguments = ["predict", "-", "--format=csv", "--batch_size=2"]
    with (tmp_path / "list").open() as listed, (tmp_path / "errors").open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "cifar_transfer", *arguments],
            stdin=listed,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=os.environ | {"PYTHONPROFILEIMPORTTIME": "1"},
        )
    with process:
        assert process.stdout.readline().startswith(b"image,label,probability,label_2,")
        process.stdout.close()
    errors = (tmp_path / "errors").read_text()
    assert "Traceback" not in errors
    assert "version_0" in errors
    imported = set()
    for line in errors.splitlines():
        if line.startswith("import time:"):
            imported.add(line.rpartition("|")[2].strip())
    assert "torchvision" in imported
    slow = {"lightning", "torchmetrics", "matplotlib", "tensorboard"}
    assert not imported & slow, "which take seconds"


def test_a_figure_and_heat_maps_are_drawn(here, tmp_path):
    figure = tmp_path / "f.png"
    maps = tmp_path / "new" / "maps"
    options = ["--top_k=2", f"--figure={figure}", f"--explain={maps}"]
    assert predict(["photos/a/003.png", "broken.png", "alpha.png", *options]) == 1
    assert sorted(path.name for path in maps.iterdir()) == ["00001-003.png", "00002-alpha.png"]
    for path in (figure, *maps.iterdir()):
        with Image.open(path) as picture:
            assert picture.width >= 4 * DPI
            assert np.asarray(picture.convert("L")).std() > 5, "not an empty page"


@pytest.mark.parametrize("images", ["photos", "photos/a/000.png"])
def test_a_figure_does_not_replace_an_image(here, images):
    image = here / "photos" / "a" / "000.png"
    before = image.read_bytes()
    with pytest.raises(UserError, match="is one of the images, and would replace it"):
        predict([images, f"--figure={image}"])
    assert image.read_bytes() == before


def test_features_are_what_comes_into_the_head(here, classifier, tmp_path, capsys):
    images = ["photos/b", "broken.png", "alpha.png", "gone.png", "photos/a"]
    out = tmp_path / "features.npz"
    assert embed([*images, f"--out={out}", "--batch_size=3"]) == 1
    printed = capsys.readouterr()
    assert printed.err.count("broken.png cannot be decoded") == 1
    assert printed.err.count("gone.png does not exist") == 1
    assert printed.out == f"9 images, 84 features each: {out}\n"

    names = [f"photos/b/{number:03d}.png" for number in range(4)]
    names.append("alpha.png")
    names += [f"photos/a/{number:03d}.png" for number in range(4)]
    batch = torch.stack([torch.from_numpy(read_image(name, SIZE)) for name in names])
    head = classifier.model.network.classifier[-1]
    head_inputs = []
    hook = head.register_forward_pre_hook(lambda _, inputs: head_inputs.append(inputs[0]))
    with torch.no_grad():
        logits = classifier.model(to_float(batch))
    hook.remove()
    with np.load(out, allow_pickle=False) as arrays:
        assert sorted(arrays) == ["features", "names", "predicted"]
        assert arrays["names"].tolist() == names
        assert arrays["predicted"].tolist() == [NAMES[label] for label in logits.argmax(1)]
        assert arrays["features"].dtype == np.float32
        np.testing.assert_allclose(arrays["features"], head_inputs[0], rtol=1e-4, atol=1e-5)


def test_features_of_an_image_whose_name_is_no_text(here, tmp_path):
    image = tmp_path / os.fsdecode(b"caf\xe9.png")
    image.write_bytes((here / "alpha.png").read_bytes())
    out = tmp_path / "f.npz"
    assert embed([str(image), f"--out={out}"]) == 0
    assert np.load(out)["names"].tolist() == [str(image)]


@pytest.mark.parametrize("out", ["f.csv", "gone/f.npz", "folder.npz"])
def test_a_file_for_features_that_cannot_be_written_is_refused_at_once(here, tmp_path, out):
    (tmp_path / "folder.npz").mkdir()
    message = r"--out .*: name a file that ends in \.npz, in a folder that exists"
    with pytest.raises(UserError, match=message):
        embed(["photos", f"--out={tmp_path / out}", "--ckpt=gone.ckpt"])


def test_a_file_of_features_stays_if_there_are_no_new_ones(here, tmp_path, monkeypatch):
    out = tmp_path / "f.npz"
    out.write_text("before")
    with pytest.raises(UserError, match=r"gone\.ckpt does not exist"):
        embed(["photos", f"--out={out}", "--ckpt=gone.ckpt"])
    assert embed(["gone.png", f"--out={out}"]) == 1
    monkeypatch.setattr(np, "savez", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError, match="division"):
        embed(["photos", f"--out={out}"])
    assert out.read_text() == "before"


def test_the_projector_has_a_point_and_a_picture_for_each_image(
    here, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("cifar_transfer.inference.embeddings.MAX_PROJECTED_IMAGES", 5)
    strange = tmp_path / "tab\tand\nline.png"
    strange.write_bytes((here / "alpha.png").read_bytes())
    board = tmp_path / "new" / "board"
    options = [f"--out={tmp_path / 'f.npz'}", f"--projector={board}", "--batch_size=2"]
    assert embed([str(strange), "broken.png", "photos", *options]) == 1
    assert f"tensorboard --logdir {board}" in capsys.readouterr().out

    arrays = np.load(tmp_path / "f.npz")
    [points] = board.rglob("tensors.tsv")
    features = arrays["features"][:5]
    np.testing.assert_allclose(np.loadtxt(points, delimiter="\t"), features, rtol=1e-5)
    config = (board / "projector_config.pbtxt").read_text()
    assert str(points.relative_to(board)) in config

    heading, *lines = points.with_name("metadata.tsv").read_text().splitlines()
    assert heading == "class\timage"
    names = [rf"{tmp_path}/tab\tand\nline.png", *arrays["names"][1:5]]
    for line, class_name, name in zip(lines, arrays["predicted"][:5], names, strict=True):
        assert line == f"{class_name}\t{name}"

    with Image.open(points.with_name("sprite.png")) as sprite:
        assert sprite.size == (3 * 32, 3 * 32)
        second_picture = np.asarray(sprite)[:32, 32:64]
    expected = read_image(names[1], SIZE).transpose(1, 2, 0)
    np.testing.assert_allclose(second_picture, expected, atol=1)


def test_the_projectors_folder_must_be_new(here, tmp_path):
    out = tmp_path / "f.npz"
    (tmp_path / "board").mkdir()
    for folder in (tmp_path / "board", out):
        with pytest.raises(UserError, match="is there already: name a new folder"):
            embed(["photos", f"--out={out}", f"--projector={folder}"])
    message = r"alpha\.png is no folder: name another place with --projector"
    with pytest.raises(UserError, match=message):
        embed(["photos", f"--out={out}", f"--projector={here / 'alpha.png' / 'board'}"])


def test_the_projector_takes_images_that_are_higher_than_wide(here, tmp_path):
    portrait = tmp_path / "runs" / "portrait.ckpt"
    module = TransferClassifier("lenet5", "none", class_names=NAMES, image_size=32)
    set_size(module, (60, 40))
    save(module, portrait)
    board = tmp_path / "board"
    options = [f"--out={tmp_path / 'f.npz'}", f"--projector={board}", f"--ckpt={portrait}"]
    assert embed(["photos", *options]) == 0
    [sprite] = board.rglob("sprite.png")
    with Image.open(sprite) as picture:
        assert picture.size == (3 * 32, 3 * 32)
        first_picture = np.asarray(picture)[:32, :32]
    assert first_picture[:, :21].std() > 5
    assert first_picture[:, 21:].max() == 0
