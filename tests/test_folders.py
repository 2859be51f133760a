"""Folders of other people: names of splits, classes in the root, groups, what is passed over."""

import json
import os
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from conftest import RUN, run_fit, untouched, write_images
from PIL import Image

from cifar_transfer import DatasetDataModule, ImageFolderDataModule
from cifar_transfer.base.errors import UserError
from cifar_transfer.cli.fit_cli import FitCLI, PlainCLI
from cifar_transfer.commands.predict import main as predict
from cifar_transfer.data import exact_duplicates, splits
from cifar_transfer.data.groups import GroupNames, with_copies_together
from cifar_transfer.data.layout import find_layout
from cifar_transfer.data.left_aside import LeftAside
from cifar_transfer.data.module import EarlierRun
from cifar_transfer.data.text_list import TextList
from cifar_transfer.inference.sources import image_files

NETWORK = ["--model.backbone=lenet5", "--model.weights=none", "--trainer.accelerator=cpu"]
FOLDER = "--data=ImageFolderDataModule"
FIT = [*NETWORK, FOLDER, "--freeze.unfreeze_epoch=0", "--report.figures=false"]


def ready(root, **options):
    data = ImageFolderDataModule(str(root), **options)
    data.prepare_data()
    data.setup()
    return data


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("train", "valid", "testing"),
        ("Training", "Validation", "TEST"),
        ("TRAIN", "dev", "Test"),
    ],
)
def test_usual_names_of_folders_are_what_they_say(tmp_path, train, val, test):
    for seed, (name, count) in enumerate({train: 6, val: 4, test: 5}.items()):
        write_images(tmp_path / name, count, seed=seed)
    data = ready(tmp_path)
    assert [len(data.images[split]) for split in ("train", "val", "test")] == [12, 8, 10]
    assert data.names["val"][0] == "val/cat/000.png"
    (tmp_path / "valid" if val != "valid" else tmp_path / "dev").mkdir()
    assert ready(tmp_path).names == data.names, "a folder without images is no second one"


def test_two_folders_of_one_split_are_refused(tmp_path):
    for name in ("train", "val", "Validation"):
        write_images(tmp_path / name, 2)
    with pytest.raises(UserError, match=r"two folders for val images, Validation and val: put "):
        ImageFolderDataModule(str(tmp_path))


def test_classes_in_the_root_are_split_in_three(tmp_path, caplog):
    write_images(tmp_path, 40)
    write_images(tmp_path, 3, classes=["test"])
    (tmp_path / "notes").mkdir()
    caplog.set_level("INFO")
    data = ready(tmp_path)
    assert data.class_names == ["cat", "dog"]
    names = data.names
    assert sum(map(len, names.values())) == len(set().union(*names.values())) == 80
    for split in ("train", "val", "test"):
        labels = data.images[split].labels
        assert set(labels) == {0, 1}
        written = [f"train/{('cat', 'dog')[label]}/" for label in labels]
        for name, beginning in zip(names[split], written, strict=True):
            assert name.startswith(beginning)
    assert "have no labels and are left alone" in caplog.text
    other_seed = ready(tmp_path, seed=1)
    assert other_seed.names["test"] == names["test"], "runs of several seeds can be compared"
    assert other_seed.names["val"] != names["val"]
    with_more = ready(tmp_path, test_fraction=0.4)
    assert set(names["test"]) < set(with_more.names["test"])
    assert "test" not in ready(tmp_path, test_fraction=0).names
    with pytest.warns(UserWarning, match="validation uses the test images"):
        clean = ready(tmp_path, val_fraction=0)
    assert clean.names["val"] == clean.names["test"] == names["test"]
    pixels = np.asarray(Image.open(tmp_path / names["test"][0].removeprefix("train/")))
    assert np.array_equal(data.images["test"].pixels(np.array([0]))[0].transpose(1, 2, 0), pixels)


def test_a_test_is_held_out_of_train_if_it_is_asked_for(tmp_path):
    write_images(tmp_path / "train", 30)
    assert list(ready(tmp_path).names) == ["train", "val"]
    data = ready(tmp_path, test_fraction=0.3)
    assert 6 <= len(data.names["test"]) <= 30
    write_images(tmp_path / "test", 3, seed=1)
    assert len(ready(tmp_path, test_fraction=0.3).images["test"]) == 6, "there is one already"
    for bad in (-0.1, 1, float("nan"), "much"):
        with pytest.raises(UserError, match=r"test_fraction is .*: take a share of the images in"):
            ImageFolderDataModule(str(tmp_path), test_fraction=bad)


def test_a_class_may_be_called_train(tmp_path):
    write_images(tmp_path, 4, classes=["bus", "car", "train"])
    assert ImageFolderDataModule(str(tmp_path)).class_names == ["bus", "car", "train"]
    shutil.rmtree(tmp_path / "bus")
    with pytest.raises(UserError, match="train has no folders: it needs one for each class"):
        ImageFolderDataModule(str(tmp_path))


def test_a_run_on_classes_in_the_root_keeps_its_test_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "photos", 20)
    before = ready("photos")
    record = {split: list(names) for split, names in before.names.items()}
    write_images(tmp_path / "more", 30, seed=3)
    for path in tmp_path.glob("more/*/*"):
        path.rename(tmp_path / "photos" / path.parent.name / f"a{path.name}")
    data = ImageFolderDataModule("photos")
    data.continue_from(EarlierRun(record=record))
    data.setup()
    assert data.names["test"] == record["test"]
    assert data.names["val"] == record["val"]
    assert len(data.names["train"]) == len(record["train"]) + 60


def test_an_evaluation_needs_no_training_images(tmp_path):
    write_images(tmp_path / "Testing", 3)
    data = ImageFolderDataModule(str(tmp_path))
    data.continue_from(EarlierRun((32, 32), class_names=["cat", "dog"]))
    data.setup("test")
    assert len(data.images["test"]) == 6


def write_video(folder, clip, frames, seed):
    """Frames of noise, all different."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for frame in range(frames):
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{clip}_{frame}.png")


@pytest.fixture
def videos(tmp_path):
    for number in range(30):
        name = "cat" if number % 2 else "dog"
        write_video(tmp_path / "train" / name, f"clip{number}", 1 + number % 5, number)
    write_video(tmp_path / "train" / "cat", "both", 3, 100)
    write_video(tmp_path / "train" / "dog", "both", 3, 101)
    return tmp_path


def clips(names):
    return {os.path.basename(name).rpartition("_")[0] for name in names}


def test_images_of_a_group_are_on_one_side(videos, caplog):
    caplog.set_level("INFO")
    split_anyhow = ready(videos, val_fraction=0.3).names
    assert clips(split_anyhow["train"]) & clips(split_anyhow["val"])
    data = ready(videos, val_fraction=0.3, group=r"(.+)_\d+", test_fraction=0.2)
    sides = [clips(data.names[split]) for split in ("train", "val", "test")]
    assert all(sides)
    assert sum(map(len, sides)) == len(set().union(*sides)) == 31, "also those of two classes"
    assert r"Groups: 31 of 96 training images; group=(.+)_\d+ matches all but 0" in caplog.text
    whole_match = ready(videos, val_fraction=0.3, group=r"^[a-z0-9]+(?=_)", test_fraction=0.2)
    assert whole_match.names == data.names
    write_video(videos / "train" / "cat", "clip30", 4, 200)
    more = ready(videos, val_fraction=0.3, group=r"(.+)_\d+", test_fraction=0.2)
    for split in ("train", "val", "test"):
        assert clips(data.names[split]) <= clips(more.names[split]), "no group changes sides"


def test_a_group_may_be_a_folder_and_a_name_without_a_match_is_its_own():
    names = ["cat/v1/1.png", "cat/v1/2.png", "dog/v1/3.png", "dog/4.png", "dog/5.png"]
    groups = GroupNames(r"(.+)/", lambda name: name.partition("/")[2])
    assert groups.keys(names) == (["v1", "v1", "v1", "dog/4.png", "dog/5.png"], 2)
    optional = GroupNames(r"(v1)?", lambda name: name.partition("/")[2])
    assert optional.keys(names)[1] == 2


@pytest.mark.parametrize(
    ("group", "match"),
    [
        ("(.+_", r"group=\(.+_ is no regular expression \(missing \), unterminated subpattern"),
        ("", "group= puts all training images into one group, ''"),
        ("dog_(.+)", r"group=dog_\(\.\+\) matches none of the names .*, such as both_0\.png: take"),
        ("(png)", r"group=\(png\) puts all training images into one group, 'png': take an"),
        ("a{99999999999}", "is no regular expression"),
        (3, "group is 3: take a regular expression"),
        (["a"], r"group is \['a'\]: take a regular expression"),
    ],
)
def test_an_expression_that_makes_no_groups_is_refused(videos, group, match):
    with pytest.raises(UserError, match=match):
        ready(videos, group=group)


@pytest.mark.parametrize("cache_limit_gb", [8, 0], ids=["cached", "on the fly"])
def test_copies_are_on_one_side(tmp_path, cache_limit_gb, monkeypatch):
    monkeypatch.setattr(exact_duplicates, "BEGINNING_BYTES", 64)
    write_images(tmp_path / "train", 12)
    options = {"val_fraction": 0.3, "cache_limit_gb": cache_limit_gb}
    for path in list(tmp_path.glob("train/*/*.png")):
        for number in range(5):
            other = "cat" if number == 4 else path.parent.name  # also under another label
            shutil.copy(
                path, path.parents[1] / other / f"{path.stem} {number} {path.parent.name}.png"
            )
    data = ready(tmp_path, **options)
    for split in ("train", "val"):
        for name in data.names[split]:
            content = (tmp_path / name).read_bytes()
            others = [other for other in data.names["train"] + data.names["val"] if other != name]
            same = [other for other in others if (tmp_path / other).read_bytes() == content]
            assert len(same) == 5
            assert set(same) <= set(data.names[split])


def test_copies_join_groups():
    keys = ["b", "b", "c", "c", "a", "d"]
    assert with_copies_together(keys, np.array([0, 1, 1, 2, 2, 3])) == ["a"] * 5 + ["d"]
    assert with_copies_together(keys, np.arange(6)) is keys


def test_new_images_of_a_group_that_is_validated_on_are_not_trained_on(videos, caplog):
    before = ready(videos, val_fraction=0.3, group=r"(.+)_\d+")
    record = {split: before.names.get(split, []) for split in ("train", "val", "test")}
    new = [name.replace("_0", "_77") for name in (record["val"][0], record["train"][0])]
    for seed, name in enumerate(new):
        pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(videos / name)
    copied = Path(record["val"][-1])
    shutil.copy(videos / copied, videos / copied.parent / "zzz.png")
    data = ImageFolderDataModule(str(videos), val_fraction=0.3, group=r"(.+)_\d+")
    data.continue_from(EarlierRun(record=record))
    caplog.set_level("INFO")
    data.setup()
    assert data.names["val"] == record["val"]
    assert set(data.names["train"]) == {*record["train"], new[1]}
    assert "1 are new and 0 are gone" in caplog.text
    assert "2 more are copies of images that are held out, or of one group with" in caplog.text


def test_groups_are_recorded(videos):
    data = ready(videos, group=r"(.+)_\d+")
    data.record_splits(videos)
    record = json.loads(splits.gzip.decompress((videos / splits.RECORD).read_bytes()))
    assert record["group"] == r"(.+)_\d+"
    assert splits.read_record(videos)["val"] == data.names["val"]


@pytest.mark.slow
def test_a_run_keeps_its_groups(videos, monkeypatch):
    monkeypatch.chdir(videos)
    options = [*FIT, "--data.root=.", r"--data.group=(.+)_\d+", "--data.batch_size=8"]
    run_fit(videos, *options, "--trainer.max_epochs=1", "--model.image_size=32")
    run = Path("lightning_logs/version_0")
    record = splits.read_record(run)
    assert not clips(record["train"]) & clips(record["val"])
    with untouched(run), pytest.raises(UserError, match=r"data.group=\(\.\+\)_ differs from"):
        FitCLI([f"--resume={run}", "--data.group=(.+)_"])


def test_groups_of_a_dataset_are_given_from_python():
    images = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)
    dataset = [(image, number % 2) for number, image in enumerate(images)]
    groups = [number // 4 for number in range(60)]
    data = DatasetDataModule(dataset, groups=np.array(groups), val_fraction=0.3)
    data.setup()
    sides = []
    for split in ("train", "val"):
        sides.append(
            {groups[int(name.partition("/")[2].partition("/")[2])] for name in data.names[split]}
        )
    assert all(sides)
    assert sides[0].isdisjoint(sides[1])
    assert data.hparams["groups"] == splits.digest([str(group) for group in groups])
    assert DatasetDataModule(dataset).hparams["groups"] is None
    with pytest.raises(UserError, match="There are 59 groups and 60 training images: give one"):
        DatasetDataModule(dataset, groups=groups[1:])
    with pytest.raises(UserError, match="groups has a for all training images"):
        DatasetDataModule(dataset, groups=["a"] * 60)


LEFT = {
    "a.CR2": ".cr2",
    "b.cr2": ".cr2",
    "no ending": "without ending",
    "v1.2 of mine": "without ending",
    ".hidden.png": "hidden",
    "Thumbs.db": None,
    ".DS_Store": None,
}


@pytest.fixture
def strange(tmp_path):
    """Images among what is no image, and thumbnails."""
    write_images(tmp_path / "train", 6)
    cat = tmp_path / "train" / "cat"
    for name in LEFT:
        (cat / name).write_bytes(b"no image")
    for folder in ("@eaDir", ".thumbnails", "__MACOSX", "#recycle"):
        write_images(cat, 2, classes=[folder])
    write_images(tmp_path / "train", 3, classes=["@eaDir"])
    (tmp_path / "train" / "loose.png").write_bytes(b"no image")
    return tmp_path


SAID = (
    "Left aside: 5 in @eaDir, 2 .cr2, 2 without ending, 2 in __MACOSX, 2 in .thumbnails, "
    "2 in #recycle, 1 hidden, 1 beside the folders of classes."
)


def kinds(text):
    return sorted(text.removeprefix("Left aside: ").partition(".\n")[0].rstrip(".").split(", "))


def test_what_is_passed_over_is_counted_once(strange, caplog):
    caplog.set_level("INFO")
    data = ImageFolderDataModule(str(strange), val_fraction=0.5)
    data.prepare_data()
    data.setup()
    data.setup()
    assert data.class_names == ["cat", "dog"]
    assert sum(map(len, data.images.values())) == 12
    (said,) = [line for line in caplog.messages if line.startswith("Left aside")]
    assert kinds(said) == kinds(SAID)


def test_predict_leaves_the_same_aside_and_says_so(strange, run, capsys):
    ckpt = run / RUN / "checkpoints" / "best.ckpt"
    options = [str(strange / "train"), f"--ckpt={ckpt}", "--accelerator=cpu", "--format=csv"]
    (strange / "train" / "loose.png").unlink()
    assert predict(options) == 0
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 1 + 12
    (line,) = [line for line in said.err.splitlines() if line.startswith("Left aside")]
    assert kinds(line) == [kind for kind in kinds(SAID) if "beside" not in kind]


@pytest.mark.parametrize(
    ("pattern", "num_files", "text"),
    [
        ("**/*.png", 12, "Left aside: 5 in @eaDir, 2 in __MACOSX, 2 in #recycle."),
        ("train/*", 12, SAID.replace(", 1 beside the folders of classes", "")),
        ("train/cat/*/*.png", 0, "Left aside: 2 in @eaDir, 2 in __MACOSX, 2 in #recycle."),
        ("train/cat/@eaDir/*.png", 2, ""),
        ("train/cat/.th*/*.png", 2, ""),
        ("../FOLDER/*/dog/*.png", 6, ""),
    ],
)
def test_a_pattern_passes_over_the_folders_that_systems_make(
    strange, monkeypatch, pattern, num_files, text
):
    """Unless it spells their name."""
    monkeypatch.chdir(strange)
    (strange / "train" / "loose.png").unlink()
    write_images(strange, 1, classes=["lightning_logs"])
    left_aside = LeftAside()
    errors = []
    files = list(image_files([pattern.replace("FOLDER", strange.name)], errors.append, left_aside))
    assert len(files) == num_files
    assert len(errors) == (num_files == 0)
    assert kinds(left_aside.text() or "") == kinds(text)


def test_what_reads_heic_is_said():
    left_aside = LeftAside()
    left_aside.add_file("IMG_1.HEIC")
    assert left_aside.text().startswith("Left aside: 1 .heic. HEIC needs pillow-heif, pip install")


def test_many_kinds_are_cut(tmp_path):
    left_aside = LeftAside()
    assert left_aside.text() is None
    for number in range(12):
        left_aside.add_file(f"x.e{number}")
    left_aside.add_file("x.e7")
    assert left_aside.text() == (
        "Left aside: 2 .e7, 1 .e0, 1 .e1, 1 .e2, 1 .e3, 1 .e4, 1 .e5, 1 .e6, 4 more."
    )
    (tmp_path / ".cifar_transfer").mkdir()
    (tmp_path / ".cifar_transfer" / "x.npy").touch()
    left_aside = LeftAside()
    left_aside.add_folder(".cifar_transfer", str(tmp_path / ".cifar_transfer"))
    assert left_aside.text() is None


@pytest.mark.parametrize("cache_limit_gb", [8, 0], ids=["cached", "on the fly"])
def test_files_that_are_left_out_are_never_decoded(tmp_path, cache_limit_gb, monkeypatch):
    write_images(tmp_path / "train", 20)
    write_images(tmp_path / "test", 4, seed=1)
    options = {"val_fraction": 0.3, "cache_limit_gb": cache_limit_gb}
    options |= {"leave_out": str(tmp_path / "list.csv"), "decode_size": None}
    whole = ready(tmp_path, val_fraction=0.3)
    broken = [whole.names["train"][3], whole.names["train"][-1], "train/dog/gone.png"]
    for name in broken[:2]:
        (tmp_path / name).write_bytes(b"broken")
    (tmp_path / broken[2]).symlink_to(tmp_path / "nowhere.png")
    Path(options["leave_out"]).write_text("\n".join(["image", *broken]))
    data = ready(tmp_path, **options)
    assert data.names["val"] == whole.names["val"]
    assert set(data.names_of_images("train")) == set(whole.names["train"]) - {*broken}
    for row, name in enumerate(data.names_of_images("train")):
        pixels = np.asarray(Image.open(tmp_path / name)).transpose(2, 0, 1)
        assert np.array_equal(data.images["train"].pixels(np.array([row]))[0], pixels)
    kept_in_val = whole.names["val"][0]
    (tmp_path / "list.csv").write_text("\n".join(["image", *broken, kept_in_val]))
    assert kept_in_val in ready(tmp_path, **options).names_of_images("val")
    (tmp_path / kept_in_val).write_bytes(b"broken")
    if cache_limit_gb:
        with pytest.raises(UserError, match="cannot be decoded"):
            ready(tmp_path, **options)
    data = ready(tmp_path, **options, leave_out_splits=["train", "val"])
    assert kept_in_val not in data.names_of_images("val")


def test_a_list_uses_the_cache_of_all_images(tmp_path, monkeypatch):
    write_images(tmp_path / "train", 8)
    whole = ready(tmp_path, val_fraction=0.3)
    (tmp_path / "list.csv").write_text(f"image\n{whole.names['train'][0]}\n")
    caches = sorted((tmp_path / ".cifar_transfer").iterdir())
    ready(tmp_path, val_fraction=0.3, leave_out=str(tmp_path / "list.csv"))
    assert sorted((tmp_path / ".cifar_transfer").iterdir()) == caches


def test_a_text_list_gives_back_any_text():
    texts = ["a", "", "猫", os.fsdecode(b"caf\xe9"), "\ud800", unicodedata.normalize("NFD", "é")]
    compact = TextList(texts, "root/")
    assert list(compact) == [f"root/{text}" for text in texts]
    assert compact[1:3] == ["root/", "root/猫"]
    assert compact.ending(np.int64(2)) == "猫"
    with pytest.raises(IndexError, match="there are 6 texts"):
        compact[6]


def test_the_index_of_many_files_is_small(tmp_path):
    folder = tmp_path / "train"
    source = tmp_path / "x.bmp"
    Image.new("RGB", (2, 2)).save(source)
    for number in range(20_000):
        if number % 10_000 == 0:
            class_folder = folder / f"class_{number}"
            class_folder.mkdir(parents=True)
        os.link(source, class_folder / f"IMG_{number:07d}.bmp")
    data = ImageFolderDataModule(str(tmp_path))
    files = data.files("train")
    assert isinstance(files.paths, TextList)
    assert isinstance(files.names, TextList)
    index_bytes = files.paths.nbytes + files.names.nbytes + files.labels.nbytes
    assert index_bytes / 20_000 < 100
    assert files.paths[19_999] == str(folder / "class_10000" / "IMG_0019999.bmp")


ROOTS = ["123", "1e5", "null", "true", "[a]", "{a: 1}", "a: b", "#x", "50% off", "a,b c", "-x"]


def test_a_root_is_text_whatever_characters_it_has(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for root in ROOTS:
        write_images(tmp_path / root / "train", 2, size=(8, 8))
    for number, root in enumerate(ROOTS):
        given = ["--data.root", root] if number % 2 else [f"--data.root={root}"]
        cli = PlainCLI([*NETWORK, FOLDER, *given])
        assert cli.datamodule.root == Path(root)
    config = cli.parser.dump(cli.config)
    assert "root: -x" in config


@pytest.mark.slow
@pytest.mark.parametrize(
    "root",
    [
        "1e5",
        pytest.param("a: b", marks=pytest.mark.whole),
        pytest.param("~x", marks=pytest.mark.whole),
    ],
)
def test_a_run_on_a_strange_root_is_resumed_and_evaluated(tmp_path, root):
    write_images(tmp_path / root / "train", 6)
    run_fit(tmp_path, *FIT, f"--data.root={root}", "--trainer.max_epochs=1")
    run = "lightning_logs/version_0"
    run_fit(tmp_path, f"--resume={run}", "--trainer.max_epochs=2")
    ckpt = f"--ckpt={run}/checkpoints/best.ckpt"
    options = [ckpt, "--split=val", "--accelerator=cpu", "--figures=false"]
    done = run_fit(tmp_path, *options, f"--root={root}", command="evaluate")
    assert "val/acc" in done.stdout


def test_a_layout_is_looked_for_in_folders_alone(tmp_path):
    assert find_layout(tmp_path / "nowhere").folders == {}
    assert find_layout(tmp_path).folders == {}
