"""Findings in images, wrong labels, near-duplicates, outliers, blanks; and leaving them out."""

import csv
import io
import os
import re
import shutil
import warnings

import numpy as np
import pytest
import torch
from conftest import RUN, run_fit, untouched, write_images
from PIL import Image, ImageEnhance, ImageOps

from cifar_transfer import ImageFolderDataModule, ShapesDataModule
from cifar_transfer.base.errors import UserError
from cifar_transfer.commands import audit
from cifar_transfer.commands.evaluate import evaluate
from cifar_transfer.data import splits
from cifar_transfer.features import findings, near_duplicates
from cifar_transfer.features.extract import Features
from cifar_transfer.training import resume
from cifar_transfer.training.evaluation import load_data

NETWORK = "shufflenet_v2_x0_5"


def clusters(count=600, classes=4, flipped=0.1):
    """Features of classes that lie apart, with wrong labels; and which are wrong."""
    rng = np.random.default_rng(0)
    true = rng.integers(0, classes, count)
    values = 4 * np.eye(classes, 6)[true] + rng.normal(size=(count, 6))
    wrong = rng.random(count) < flipped
    labels = np.where(wrong, (true + rng.integers(1, classes, count)) % classes, true)
    return values.astype(np.float32), labels, wrong


def test_flipped_labels_are_found():
    values, labels, wrong = clusters()
    features = {}
    for split, rows in (("train", slice(400)), ("val", slice(400, 500)), ("test", slice(500, 600))):
        features[split] = Features([values[rows]], labels[rows])
    probabilities = findings.out_of_sample_probabilities(features, 4)
    assert probabilities.shape == (600, 4)
    label_findings = findings.wrong_labels(probabilities, torch.from_numpy(labels))
    rows = [finding.row for finding in label_findings]
    assert len(set(rows) & set(np.flatnonzero(wrong))) > 0.9 * wrong.sum()
    assert wrong[rows[: wrong.sum() // 2]].all(), "the surest first"


def test_the_rule_of_confident_learning_by_hand():
    probabilities = torch.tensor(
        [[0.9, 0.1, 0], [0.7, 0.3, 0], [0.2, 0.8, 0], [0.3, 0.7, 0], [0.75, 0.25, 0]]
    )
    labels = torch.tensor([0, 0, 1, 0, 1])
    # Mean probability of the label: class 0 (0.9 + 0.7 + 0.3) / 3, class 1 (0.8 + 0.25) / 2. No
    # image is of class 2. So rows 0, 1 and 4 are of class 0, rows 2 and 3 of class 1.
    assert findings.expected_label_errors(probabilities, labels) == 2
    assert findings.wrong_labels(probabilities, labels) == [
        (4, 0.75, 0),
        (3, pytest.approx(0.7), 1),
    ]


def test_no_image_is_judged_by_a_model_that_has_seen_it():
    """The labels are random: only a model that has seen them would know them."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(120, 200)).astype(np.float32)
    labels = rng.integers(0, 2, 120)
    features = {
        "train": Features([values[:100]], labels[:100]),
        "val": Features([values[100:]], labels[100:]),
    }
    probabilities = findings.out_of_sample_probabilities(features, 2)
    assert (probabilities.argmax(1).numpy() == labels)[:100].mean() < 0.7


@pytest.mark.parametrize("count", [2, 3])
def test_fewer_images_than_folds(count):
    features = Features([np.eye(count, 4, dtype=np.float32)], np.arange(count) % 2)
    probabilities = findings.out_of_sample_probabilities({"train": features, "val": features}, 2)
    assert probabilities.sum(1).tolist() == pytest.approx([1.0] * (2 * count))


def photo(seed, side=64):
    """Blobs, which look like no other image."""
    small = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    return Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)


def compressed(image):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=40)
    return Image.open(file)


def shifted(image, right, down):
    return image.transform(image.size, Image.Transform.AFFINE, (1, 0, right, 0, 1, down))


CHANGES = {
    "the same": lambda image: image,
    "mirrored": ImageOps.mirror,
    "upside down": ImageOps.flip,
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.2),
    "less contrast": lambda image: ImageEnhance.Contrast(image).enhance(0.6),
    "without colours": lambda image: image.convert("L").convert("RGB"),
    "compressed": compressed,
    "shifted": lambda image: shifted(image, 4, -5),
    "mirrored, shifted": lambda image: shifted(ImageOps.mirror(image), 6, 3),
    "mirrored, shifted, compressed": lambda image: compressed(
        shifted(ImageOps.mirror(image), -4, 4)
    ),
    "turned": lambda image: image.rotate(5, Image.Resampling.BILINEAR),
    "cut": lambda image: image.crop((4, 4, 60, 60)).resize(image.size),
}


def grey(images):
    """What is compared of images of Pillow."""
    pixels = [torch.from_numpy(np.array(image).transpose(2, 0, 1)) for image in images]
    return findings.compared_images([torch.stack(pixels)]).grey


@pytest.mark.parametrize("change", CHANGES)
def test_changed_copies_are_alike_and_other_images_are_not(change):
    images = [photo(seed) for seed in range(20)]
    plain = grey(images)
    changed = grey([CHANGES[change](image) for image in images])
    alike = near_duplicates.similarities(plain, changed)
    assert alike.min() > near_duplicates.MIN_CORRELATION
    assert near_duplicates.similarities(plain, plain.roll(1, 0)).max() == 0


@pytest.mark.parametrize("change", CHANGES)
def test_changed_copies_are_found_whatever_the_features_say(change):
    """Spectra propose them too: a copy without colours has other features."""
    images = [photo(seed) for seed in range(60)]
    copies = [CHANGES[change](image) for image in images[:20]]
    nowhere = findings.Neighbours(torch.zeros(80, 1), torch.zeros(80, 1, dtype=torch.long))
    duplicates = near_duplicates.near_duplicates(nowhere, grey(images + copies))
    assert len(duplicates) >= 18
    for finding in duplicates:
        assert finding.like == finding.row - 60


def silhouette(seed):
    """A dark shape of its own before the same sky: only what is coarse is alike."""
    sky = np.linspace(250, 60, 64)[:, None, None] * np.ones((1, 64, 3))
    noise = np.random.default_rng(seed).normal(0, 20, (32, 32, 1)).repeat(2, 0).repeat(2, 1)
    return Image.fromarray((sky + noise).clip(0, 255).astype(np.uint8))


def test_images_that_are_alike_in_what_is_coarse_alone_are_no_duplicates():
    plain = grey([silhouette(seed) for seed in range(20)])
    parts = near_duplicates._parts(plain.roll(1, 0).float())
    coarse = near_duplicates._align(plain.float(), parts).correlations
    assert coarse.min() > near_duplicates.MIN_CORRELATION
    assert near_duplicates.similarities(plain, plain.roll(1, 0)).max() == 0


def test_near_duplicates_name_the_later_image_once():
    images = grey([photo(seed) for seed in (0, 1, 0, 0)])
    rows = torch.tensor([[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]])
    like = findings.Neighbours(torch.full((4, 3), 0.9), rows)
    duplicates = near_duplicates.near_duplicates(like, images)
    assert sorted((finding.row, finding.like) for finding in duplicates) == [(2, 0), (3, 0)]


@pytest.mark.parametrize("count", [2, 3])
def test_few_or_blank_images_have_no_duplicates(count):
    nowhere = findings.Neighbours(torch.zeros(count, 1), torch.zeros(count, 1, dtype=torch.long))
    blank = torch.full((count, 32, 32), 90, dtype=torch.uint8)
    assert near_duplicates.near_duplicates(nowhere, blank) == []


def test_neighbours_and_outliers_are_those_of_plain_loops(monkeypatch):
    """Few features are not projected to fewer; blocks have two images."""
    monkeypatch.setattr(findings, "MAX_COSINES", 24)
    rng = np.random.default_rng(0)
    values = rng.normal(size=(12, 6)).astype(np.float32)
    labels = np.zeros(12, np.int64)
    features = {
        "train": Features([values[:8]], labels[:8]),
        "test": Features([values[8:]], labels[8:]),
    }
    neighbours = findings.nearest_images(features)
    points = (values - values[:8].mean(0)) / values[:8].std(0)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    cosines = points @ points.T
    np.fill_diagonal(cosines, -1)
    for row in range(12):
        order = np.argsort(-cosines[row])[: findings.NUM_NEIGHBOURS]
        assert neighbours.rows[row].tolist() == order.tolist()
        np.testing.assert_allclose(neighbours.cosines[row], cosines[row, order], atol=1e-5)
    distances = 1 - np.sort(cosines)[:, -findings.NUM_NEIGHBOURS :].mean(1)
    rows = [finding.row for finding in findings.outliers(neighbours)]
    assert rows == np.argsort(-distances).tolist()


def test_a_feature_that_is_constant_in_training_makes_no_outliers_and_hides_no_neighbours():
    """Test images have other values. Divided by almost nothing, they would be all there is."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(60, 6)).astype(np.float32)
    values[50:] = values[:10]
    values[20] = 30 * np.array([1, -1, 1, -1, 1, -1])
    constant = np.full((60, 1), 0.5, np.float32)
    constant[50:] = rng.normal(size=(10, 1))
    labels = np.zeros(60, np.int64)
    seen = []
    for array in (values, np.hstack([values, constant])):
        features = {
            "train": Features([array[:50]], labels[:50]),
            "test": Features([array[50:]], labels[50:]),
        }
        neighbours = findings.nearest_images(features)
        assert neighbours.rows[50:, 0].tolist() == list(range(10)), "the copies"
        seen.append([finding.row for finding in findings.outliers(neighbours)])
    assert seen[0] == seen[1]


def test_labels_are_ranked_by_how_improbable_they_are():
    """An image that looks like two other classes is surer than one whose label is still likely."""
    probabilities = torch.tensor(
        [[0.05, 0.5, 0.45], [0.3, 0.7, 0], [0.6, 0.4, 0], [0.1, 0.5, 0.4], [0, 0.1, 0.9]]
    )
    labels = torch.tensor([0, 0, 0, 1, 2])
    label_findings = findings.wrong_labels(probabilities, labels)
    assert label_findings == [(0, pytest.approx(0.95), 1), (1, pytest.approx(0.7), 1)]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Photos of two kinds: a test image is a copy, one is blank, one class needs escapes."""
    folder = tmp_path_factory.mktemp("audit") / "photos"
    for split, count in (("train", 24), ("test", 8)):
        for number, kind in enumerate(("cat", "<b>dog")):
            (folder / split / kind).mkdir(parents=True)
            for row in range(count):
                image = photo(1000 * count + 100 * number + row, 32)
                image.save(folder / split / kind / f"{row:03}.png")
    copied = Image.open(folder / "train" / "cat" / "005.png")
    compressed(copied).save(folder / "test" / "cat" / "copy.png")
    Image.new("RGB", (32, 32), (90, 90, 90)).save(folder / "train" / "cat" / "nothing.png")
    return folder


@pytest.fixture(scope="module")
def audited(photos):
    data = ["--data=ImageFolderDataModule", f"--data.root={photos}", "--data.val_fraction=0.2"]
    options = [
        f"{NETWORK}=none",
        *data,
        "--model.image_size=64",
        "--features=kept",
        "--trainer.accelerator=cpu",
    ]
    with untouched(*(photos / split for split in ("train", "test"))):
        done = run_fit(photos.parent, *options, command="audit")
    return photos.parent / "lightning_logs" / "audit", done


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_files_and_the_page_tell_what_was_found(audited):
    out, done = audited
    assert [*rows(out / "blank.csv")[0].values()] == [
        "train/cat/nothing.png",
        "cat",
        "blank",
        "1.0000",
        "",
    ]
    (copy,) = rows(out / "duplicates.csv")
    assert (copy["image"], copy["like"]) == ("test/cat/copy.png", "train/cat/005.png")
    assert float(copy["score"]) > near_duplicates.MIN_CORRELATION
    assert {row["like"] for row in rows(out / "labels.csv")} <= {"cat", "<b>dog"}
    page = (out / "audit.html").read_text()
    assert (
        page.count("<img ")
        == sum(len(rows(out / f"{name}.csv")) for name in ("labels", "outliers", "blank")) + 2
    )
    assert "<b>dog" not in page
    assert "&lt;b&gt;dog" in page
    assert f"look at it   {(out / 'audit.html').relative_to(out.parents[1])}" in done.stdout
    assert [
        line.split("|")[2:5] for line in done.stdout.splitlines() if line.startswith("| duplicates")
    ] == [["     0 ", "   0 ", "    1 "]]


def test_a_list_that_is_there_is_not_replaced(audited, photos):
    out, done = audited
    assert re.search(r"cross-validated accuracy  \d+\.\d%", done.stderr)
    assert re.search(
        r"do without   python -m cifar_transfer fit --data\.leave_out=FILE, once",
        done.stdout,
    )
    message = r"labels\.csv is there already, and may have been edited: name another folder"
    with untouched(out), pytest.raises(UserError, match=message):
        audit.main([f"{NETWORK}=none", f"--out={out}"])


def test_each_image_is_looked_at_once_whatever_it_is_called(tmp_path):
    """Without images held out; and with names that are no text, of which a list has escapes."""
    strange = os.fsdecode(b"\xff\n,.png")
    for number, path in enumerate(
        ["train/a/1.png", f"train/b/{strange}", "test/a/1.png", f"test/b/{strange}"]
    ):
        (tmp_path / path).parent.mkdir(parents=True)
        photo(number, 32).save(tmp_path / path)
    data = ["--data=ImageFolderDataModule", f"--data.root={tmp_path}", "--data.val_fraction=0"]
    job = [
        "lenet5=none",
        *data,
        "--trainer.accelerator=cpu",
        f"--features={tmp_path}",
        f"--out={tmp_path / 'out'}",
    ]
    with pytest.raises(UserError, match="no linear layer"):
        audit.main(["squeezenet1_1=none", *job[1:]])
    assert not (tmp_path / "out").exists()
    run_fit(tmp_path, *job, command="audit")
    assert rows(tmp_path / "out" / "duplicates.csv") == []
    found = [row["image"] for row in rows(tmp_path / "out" / "outliers.csv")]
    assert sorted(found) == [
        "test/a/1.png",
        "test/b/\\udcff\n,.png",
        "train/a/1.png",
        "train/b/\\udcff\n,.png",
    ]
    (tmp_path / "list.csv").write_text('image\n"train/b/\\udcff\n,.png"\n', newline="")
    left = splits.rows_left(
        {"train": ["train/a/1.png", f"train/b/{strange}"]}, str(tmp_path / "list.csv")
    )
    assert left["train"].tolist() == [0]


@pytest.mark.slow
def test_a_run_does_without_what_is_listed(photos, tmp_path):
    (tmp_path / "out.csv").write_text(
        "image\ntest/cat/copy.png\ntrain/cat/nothing.png\ntrain/gone.png\n"
    )
    data = [
        "--data=ImageFolderDataModule",
        f"--data.root={photos}",
        f"--data.leave_out={tmp_path / 'out.csv'}",
        "--data.leave_out_splits=[train,val,test]",
    ]
    done = run_fit(
        tmp_path,
        *data,
        f"--model.backbone={NETWORK}",
        "--model.weights=none",
        "--trainer.max_epochs=1",
    )
    assert re.search(
        r"Left out: \d of \d+ train, \d of \d+ val, 1 of \d+ test images, those in "
        rf"{tmp_path}/out.csv",
        done.stderr,
    )
    recorded = splits.read_record(tmp_path / RUN)
    assert (
        "train/cat/nothing.png" in recorded["train"] + recorded["val"]
    )  # so that it comes back to where it was
    again = run_fit(tmp_path, f"--resume={tmp_path / RUN}", "--trainer.max_epochs=2")
    assert re.search(r"Left out: .*[^0] of \d+ test images", again.stderr)
    assert "have changed" not in again.stderr
    shutil.copy(tmp_path / "out.csv", tmp_path / "same.csv")
    (tmp_path / "out.csv").write_text("image\ntest/cat/copy.png\n")
    checkpoint = torch.load(tmp_path / RUN / "checkpoints" / "last.ckpt", weights_only=True)
    saved = {"data.left_out": checkpoint["datamodule_hyper_parameters"]["left_out"]}
    same, other = (
        {"data.left_out": splits.list_digest(str(tmp_path / f"{name}.csv"))}
        for name in ("same", "out")
    )
    resume.refuse_changes(saved, same)
    with pytest.raises(UserError, match=r"data\.leave_out=1 images \(.*\) differs from 3 images"):
        resume.refuse_changes(saved, other)
    with pytest.warns(
        UserWarning,
        match=r"out\.csv, the list .* has changed: now 1 images \(.*, in training 3 images",
    ):
        load_data(checkpoint)
    shutil.copy(tmp_path / "same.csv", tmp_path / "out.csv")
    with warnings.catch_warnings(action="error"):
        load_data(checkpoint)
    with untouched(tmp_path / RUN):
        (tmp_path / "out.csv").unlink()
        refused = run_fit(
            tmp_path, f"--resume={tmp_path / RUN}", "--trainer.max_epochs=3", expect=2
        )
    assert re.search(
        r"--data\.leave_out=.+out\.csv cannot be read .*: name another one", refused.stderr
    )


@pytest.mark.slow
def test_evaluate_tells_both(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run / RUN, tmp_path / "run")
    ckpt = tmp_path / "run" / "checkpoints" / "best.ckpt"
    names = splits.read_record(ckpt.parents[1])["test"]
    (tmp_path / "half.csv").write_text(
        "image,why\n" + "".join(f"{name},x\n" for name in names[: len(names) // 2])
    )
    scores = evaluate(str(ckpt), accelerator="cpu", figures=False, leave_out="half.csv")
    (tmp_path / "other.csv").write_text(
        "image\n" + "".join(f"{name}\n" for name in names[len(names) // 2 :])
    )
    others = evaluate(str(ckpt), accelerator="cpu", figures=False, leave_out="other.csv")
    share = len(names) // 2 / len(names)
    both = (1 - share) * scores["test/acc_without"] + share * others["test/acc_without"]
    assert both == pytest.approx(scores["test/acc"], abs=1e-6)
    assert scores["test/acc"] == others["test/acc"]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b"train/cat/1.png\n", "has no column `image`"),
        (
            b"image\ntrain/kite/1.png\n",
            r"lists none of these images, but, for example, train/kite/1\.png",
        ),
        (b"image\n\xff\n", "cannot be read as a list of images"),
        (None, r"cannot be read as a list of images \(No such file or directory\)"),
    ],
)
def test_a_list_of_nothing_is_refused(tmp_path, text, match):
    if text is not None:
        (tmp_path / "list.csv").write_bytes(text)
    with pytest.raises(UserError, match=match):
        ShapesDataModule(
            train_images=40, test_images=10, leave_out=str(tmp_path / "list.csv")
        ).setup()


def test_all_of_a_split_is_refused(tmp_path):
    write_images(tmp_path / "photos" / "train", 5)
    write_images(tmp_path / "photos" / "test", 2)
    names = "".join(f"test/{kind}/{row:03}.png\n" for kind in ("cat", "dog") for row in range(2))
    (tmp_path / "list.csv").write_text(f"image\n{names}")
    data = ImageFolderDataModule(
        root=str(tmp_path / "photos"),
        leave_out=str(tmp_path / "list.csv"),
        leave_out_splits="test",
    )
    with pytest.raises(UserError, match="lists all test images: list fewer"):
        data.setup()
