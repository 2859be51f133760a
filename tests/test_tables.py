"""Tables of images and labels: as people write them, as `predict` prints them, and unfit ones."""

import csv
import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import RUN, run_fit, write_images
from PIL import Image

from cifar_transfer import FileImages, ImageDataModule, ImageFolderDataModule, TableDataModule
from cifar_transfer.base.errors import UserError
from cifar_transfer.base.text import from_spreadsheet_cell, spreadsheet_cell
from cifar_transfer.commands.evaluate import evaluate
from cifar_transfer.commands.predict import main as predict

BEST = f"{RUN}/checkpoints/best.ckpt"
JOB = [
    "--model.backbone=lenet5",
    "--model.weights=none",
    "--freeze.unfreeze_epoch=0",
    "--trainer.max_epochs=1",
    "--trainer.accelerator=cpu",
    "--report.figures=false",
]


def ready(data):
    data.prepare_data()
    data.setup()
    return data


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """A folder of images, which is the current one."""
    write_images(tmp_path / "photos", 6)
    monkeypatch.chdir(tmp_path / "photos")
    return tmp_path / "photos"


def rows_of(folder=".", seen_from="."):
    """Return a row for each image below a folder."""
    rows = []
    for path in sorted(Path(seen_from, folder).glob("*/*.png")):
        rows.append(f"{path.relative_to(seen_from)},{path.parent.name}")
    return rows


def write(name, rows, heading="image,label", end="\n", encoding="utf-8"):
    text = end.join([heading, *rows, ""])
    Path(name).write_bytes(text.encode(encoding))


def test_a_table_is_the_folder_that_it_lists(photos):
    write("train.csv", rows_of())
    table = ready(TableDataModule("train.csv", val_fraction=0.3))
    (photos / "train").mkdir()
    for name in table.class_names:
        (photos / name).rename(photos / "train" / name)
    folder = ready(ImageFolderDataModule(".", val_fraction=0.3))
    assert table.class_names == ["cat", "dog"]
    assert table.names == folder.names
    for split in ("train", "val"):
        for row in range(len(table.images[split])):
            image, label = table.images[split][row]
            assert np.array_equal(image, folder.images[split][row][0])
            assert label == folder.images[split][row][1]


WRITTEN = {
    "commas": {},
    "semicolons": {"delimiter": ";"},
    "tabs": {"delimiter": "\t"},
    "a byte order mark": {"encoding": "utf-8-sig"},
    "ends of lines as on Windows": {"end": "\r\n"},
    "ends of lines as on old Macs": {"end": "\r"},
    "empty lines": {"end": "\n\n"},
    "spaces": {"delimiter": " , "},
}


@pytest.mark.parametrize("how", WRITTEN)
def test_a_table_is_read_however_it_was_written(photos, how):
    options = dict(WRITTEN[how])
    delimiter = options.pop("delimiter", ",")
    rows = [row.replace(",", delimiter) + f"{delimiter}x" for row in rows_of()]
    write("train.csv", rows, delimiter.join(["image", "label", "more"]), **options)
    data = ready(TableDataModule("train.csv", val_fraction=0.3))
    assert data.class_names == ["cat", "dog"]
    assert sum(map(len, data.images.values())) == 12


def test_columns_have_any_names_and_order_and_files_any_place(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [f"{label},x,{image}" for image, label in (row.split(",") for row in rows_of("photos"))]
    rows[0] = f"cat,x,{photos / 'cat/000.png'}"
    rows[1] = "cat,x,./photos/../photos/cat/001.png"
    Path("tables").mkdir()
    rows[2:] = [row.replace("photos/", "../photos/") for row in rows[2:]]
    rows[1] = rows[1].replace("./photos", "../photos", 1)
    write("tables/train.csv", rows, "what,else,file")
    options = {"image_column": "file", "label_column": "what", "val_fraction": 0.3}
    data = ready(TableDataModule("train.csv", tables="tables", **options))
    assert sum(map(len, data.images.values())) == 12
    names = {*data.names["train"], *data.names["val"]}
    assert len(names) == 12
    assert f"train/{photos}/cat/000.png" in {name.replace("val/", "train/") for name in names}


def test_repeated_rows_are_one_image(photos):
    write("train.csv", [*rows_of(), *rows_of()[:2], "./cat/../cat/000.png,cat"])
    data = ready(TableDataModule("train.csv"))
    assert sum(map(len, data.images.values())) == 12


def with_patients(rows, num_patients):
    """Rows with a column of patients, whose images follow one another."""
    return [f"{row},patient {place % num_patients}" for place, row in enumerate(rows)]


PATIENTS = "image,label,patient"


def test_images_of_a_group_are_held_out_together(photos, caplog):
    caplog.set_level("INFO")
    rows = with_patients(rows_of(), 4)
    write("train.csv", rows, PATIENTS)
    patients = {f"train/{row.split(',')[0]}": row.split(",")[2] for row in rows}
    options = {"val_fraction": 0.4, "group_column": "patient"}
    data = ready(TableDataModule("train.csv", **options))
    held_out = {patients[name] for name in data.names["val"]}
    trained_on = {patients[name] for name in data.names["train"]}
    assert held_out
    assert trained_on
    assert not held_out & trained_on
    assert "Groups: 4 of 12 training images; the column patient." in caplog.text
    alone = ready(TableDataModule("train.csv", val_fraction=0.4))
    assert {patients[name] for name in alone.names["val"]} & {
        patients[name] for name in alone.names["train"]
    }, "without the column they are torn apart"


@pytest.mark.parametrize("seed", range(4))
def test_copies_join_the_groups_of_a_column(photos, seed):
    """Patients 0 and 1 have the same image, and so are one group."""
    rows = with_patients(rows_of(), 6)
    write("train.csv", rows, PATIENTS)
    shutil.copy("cat/000.png", "cat/001.png")
    data = ready(TableDataModule("train.csv", val_fraction=0.4, group_column="patient", seed=seed))
    patients = {f"train/{row.split(',')[0]}": row.split(",")[2] for row in rows}
    joined = {"patient 0", "patient 1"}
    held_out = {patients[name] for name in data.names["val"]}
    assert held_out & joined in (set(), joined)


def test_groups_without_a_use_are_said(photos, caplog):
    """The table of validation needs no column of groups."""
    caplog.set_level("INFO")
    write("train.csv", with_patients(rows_of(), 4), PATIENTS)
    write("val.csv", rows_of())
    with pytest.warns(UserWarning, match="are also among those of training"):
        ready(TableDataModule("train.csv", val="val.csv", group_column="patient"))
    assert (
        "group_column=patient is not used, because no training images are held out" in caplog.text
    )


@pytest.mark.parametrize(
    ("rows", "options", "match"),
    [
        (4, {"group_column": "scene"}, r"line 1: the heading has no column scene, but .*patient"),
        (4, {"group_column": "patient", "group": "x"}, "group and group_column both say which"),
        (4, {"group_column": ""}, "group_column is : take the name of a column"),
        (4, {"group_column": 3}, "group_column is 3: take the name of a column"),
        (1, {"group_column": "patient"}, "group_column=patient puts all .* one group, 'patient 0'"),
        ("empty", {"group_column": "patient"}, "line 2: the cell of patient is empty: fill it"),
        ("two", {"group_column": "patient"}, "000.png is of the group b, and of a in line 2: keep"),
    ],
)
def test_groups_that_make_no_sense_are_refused(photos, rows, options, match):
    if isinstance(rows, int):
        lines = with_patients(rows_of(), rows)
    else:
        lines = with_patients(rows_of(), 4)
        lines[0] = "cat/000.png,cat," + {"empty": "", "two": "a"}[rows]
        lines.append("cat/000.png,cat,b")
    write("train.csv", lines, PATIENTS)
    with pytest.raises(UserError, match=match):
        ready(TableDataModule("train.csv", **options))


ROWS = ["cat/000.png,cat", "cat/001.png,cat", "dog/000.png,dog", "dog/001.png,dog"]
UNFIT = {
    "no file": (None, r"^train\.csv cannot be read as a table \(No such file.*, seen from /"),
    "empty": (b"", r"^train\.csv is empty: it needs a heading, image,label, and a row"),
    "a heading only": (b"image,label\n\n", r"^train\.csv has a heading and no rows: add a row"),
    "one label": (b"image,label\ncat/000.png,cat\n", r"^train\.csv has one label only \(cat\)"),
    "no such column": (
        ("\n".join(["file,label", *ROWS])).encode(),
        r"^train\.csv, line 1: the heading has no column image, but file, label: name the columns",
    ),
    "no heading": (
        "\n".join(ROWS).encode(),
        r"^train\.csv, line 1: the heading has no column image, but cat/000\.png, cat",
    ),
    "an empty cell": (
        "\n".join(["image,label", *ROWS, "cat/002.png,"]).encode(),
        r"^train\.csv, line 6: the cell of label is empty: fill it",
    ),
    "a row cut short": (
        "\n".join(["image,label", "cat/002.png", *ROWS]).encode(),
        r"^train\.csv, line 2: the cell of label is empty",
    ),
    "a comma in a name": (
        "\n".join(["image,label", *ROWS, "cat/a,b.png,cat"]).encode(),
        r"^train\.csv, line 6: the row has 3 cells, and the heading 2: put cells .* into quotes",
    ),
    "files that are not there": (
        "\n".join(["image,label", *ROWS, "cat/gone.png,cat", "x,dog", "cat,dog"]).encode(),
        r"^train\.csv, line 6: there is no file cat/gone\.png, nor are those of 2 more rows, seen",
    ),
    "two labels": (
        "\n".join(["image,label", *ROWS, "./cat/001.png,dog"]).encode(),
        r"^train\.csv, line 6: \./cat/001\.png is dog, and cat in line 3: keep one",
    ),
    "another encoding": (
        "\n".join(["image,label", *ROWS]).encode() + b"\ncaf\xe9.png,cat\n",
        r"^train\.csv, line 6: it is no text in UTF-8: save the table as CSV in UTF-8",
    ),
    "a spreadsheet's own format": (
        b"PK\x03\x04\x14\x00\xd0\xcf\x11\xe0",
        r"^train\.csv, line 1: it is no text in UTF-8",
    ),
    "an open quote": (
        ("\n".join(["image,label", '"cat/000.png,cat', *ROWS[1:]]) + "\n" * 140_000).encode(),
        r"^train\.csv, line 2: field larger than field limit \(131072\): mend the table",
    ),
}


@pytest.mark.parametrize("fault", UNFIT)
def test_an_unfit_table_is_refused_in_a_sentence_with_its_line(photos, fault):
    content, message = UNFIT[fault]
    if content is not None:
        Path("train.csv").write_bytes(content)
    before = sorted(photos.iterdir())
    with pytest.raises(UserError, match=message) as error:
        ready(TableDataModule("train.csv"))
    assert "\n" not in str(error.value)
    assert sorted(photos.iterdir()) == before, "nothing is written"


def test_a_label_of_validation_that_is_no_class_is_named_with_its_line(photos):
    write("train.csv", ROWS)
    write("val.csv", ["cat/002.png,cat", "dog/003.png,cow"])
    with pytest.raises(UserError, match=r"val\.csv, line 3: cow is no class of training \(cat, do"):
        ready(TableDataModule("train.csv", "val.csv"))


def test_what_is_no_name_of_a_table_is_refused(photos):
    for options, message in (
        ({"train": ""}, r"train is : take a file, such as train\.csv"),
        ({"train": None}, "train is null: take a file"),
        ({"train": "train.csv", "val": 3}, "val is 3: take a file"),
        ({"train": "train.csv", "image_column": ""}, "image_column is : take the name of a col"),
        ({"train": "."}, r"^\. cannot be read as a table \(is no regular file\)"),
    ):
        with pytest.raises(UserError, match=message):
            TableDataModule(**options)


@pytest.mark.parametrize("text", ["cat", "=1+1", "-x", "'-x", "'cat'", "+", "@home", "'"])
def test_a_cell_that_was_kept_from_being_a_formula_is_read_back(text):
    assert from_spreadsheet_cell(spreadsheet_cell(text)) == text or text == "'-x"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with images, tables of them, and a run on these."""
    folder = tmp_path_factory.mktemp("tables")
    write_images(folder / "photos", 12, classes=("-cat", "dog"))
    write_images(folder / "others", 5, classes=("-cat", "dog"), seed=1)
    write(folder / "train.csv", rows_of("photos", folder))
    write(folder / "test.csv", rows_of("others", folder))
    options = ["--data=TableDataModule", "--data.train=train.csv", "--data.test=test.csv"]
    run_fit(folder, *options, "--data.batch_size=4", *JOB)
    return folder


def test_predictions_are_a_table_to_train_on(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    assert predict(["others", f"--ckpt={BEST}", "--accelerator=cpu", "--format=csv"]) == 0
    printed = capsys.readouterr().out
    rows = list(csv.DictReader(io.StringIO(printed)))
    assert list(rows[0]) == ["image", "label", "probability", "label_2", "probability_2"]
    labels = dict(row.split(",") for row in rows_of("others"))
    assert [row["image"] for row in rows] == list(labels)
    correct = [row["label"].removeprefix("'") == labels[row["image"]] for row in rows]
    scores = evaluate(BEST, accelerator="cpu", figures=False)
    assert scores["test/acc"] == pytest.approx(np.mean(correct))
    if len({row["label"] for row in rows}) == 1:  # because the network knows nothing
        printed = printed.replace(rows[0]["label"], rows[0]["label_2"], 1)
    Path("new.csv").write_text(printed)
    data = ready(TableDataModule("new.csv"))
    assert sum(map(len, data.images.values())) == 10
    assert data.class_names == ["-cat", "dog"]


def test_a_run_on_tables_is_evaluated_from_elsewhere(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(trained)
    scores = evaluate(BEST, accelerator="cpu", figures=False)
    monkeypatch.chdir(tmp_path)
    ckpt = str(trained / BEST)
    with pytest.raises(UserError, match=r"train\.csv cannot be read as a table .*, seen from "):
        evaluate(ckpt, accelerator="cpu", figures=False)
    shutil.copy(trained / "test.csv", tmp_path)  # that of training is not needed for a test
    (tmp_path / "others").symlink_to(trained / "others")
    elsewhere = evaluate(ckpt, accelerator="cpu", figures=False, root=str(tmp_path))
    assert elsewhere == scores


class Files(ImageDataModule):
    class_names = ("cat", "dog")
    size_of_files = None

    def load(self, split):
        if split == "val":
            return None
        paths = sorted(Path("photos").glob("*/*.png"))
        labels = [self.class_names.index(path.parent.name) for path in paths]
        return FileImages(paths, labels, self.size_of_files)


def test_files_from_python_are_images_of_the_size_that_suits_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "photos", 6, size=(40, 30))
    data = ready(Files())
    assert data.image_size == (30, 40)
    image, label = data.images["test"][0]
    with Image.open("photos/cat/000.png") as picture:
        assert np.array_equal(image.permute(1, 2, 0), np.asarray(picture))
    assert label == 0
    Image.new("RGB", (80, 50)).save("photos/dog/000.png")
    assert ready(Files()).images["test"][6][0].shape == (3, 30, 40)
    paths = sorted(Path("photos").glob("*/*.png"))
    assert FileImages(paths, [0] * 12, (16, 16))[6][0].shape == (3, 16, 16)


def test_files_from_python_that_do_not_fit_get_a_sentence(tmp_path):
    with pytest.raises(UserError, match="There are 1 paths and 2 labels: give one for each"):
        FileImages(["a.png"], [0, 1])
    with pytest.raises(UserError, match="There are no images: name some files"):
        FileImages([], [])
    with pytest.raises(UserError, match=r"^a\.png does not exist"):
        FileImages(["a.png"], [0])
