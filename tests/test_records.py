"""What README, the recipes and the documents claim is what was measured."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import SHARED

from benchmarks import drawn_photographs, records

ROOT = Path(__file__).resolve().parents[1]
RECORDS = [record for record in records.all_records() if record.seed_folders]
CITING = [ROOT / "README.md", ROOT / "README.zh-CN.md", *sorted(ROOT.glob("configs/*.yaml"))]
# Measured before there were records, with one or two seeds, and said so where they are cited.
EARLIER = {
    "79.9": "the default recipe, lightning_logs/reference",
    "74.7": "scratch.yaml",
    "94.2": "cpu.yaml",
    "94.15": "cpu.yaml, seed 0",
    "94.34": "cpu.yaml, seed 1",
}
# A recipe run again, on whatever machine, may end a little outside what five seeds gave.
MARGIN = 1.5  # percentage points


def figures(record):
    """All figures of a record that may be cited, in percent with one decimal."""
    values = []
    for result in record.results:
        accuracies = record.accuracies(result)
        values += [min(accuracies), max(accuracies), sum(accuracies) / len(accuracies)]
    return {f"{value:.1f}" for value in values}


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.name)
def test_what_cites_a_record_has_its_figures(record):
    for result in record.results:
        assert record.claimed_in[result]
        for name in record.claimed_in[result]:
            text = " ".join((ROOT / name).read_text().replace("#", " ").split())
            claim = record.claim(result)
            if name.endswith("zh-CN.md"):
                claim = claim.partition(" (")[0]
            assert claim in text, f"{name} does not say {claim} of {record.name}, {result}"


@pytest.mark.parametrize("path", CITING, ids=lambda path: path.name)
def test_no_accuracy_is_claimed_that_is_not_recorded(path):
    known = set(EARLIER)
    for record in RECORDS:
        known |= figures(record)
    claimed = set(re.findall(r"(\d+\.\d+)[ *]*%", path.read_text()))
    assert claimed <= known


def test_the_table_of_the_records_is_up_to_date():
    assert (records.RECORDS / records.TABLE).read_text() == records.page(records.all_records())


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.name)
def test_a_record_says_what_it_was_measured_with(record):
    for number, folder in enumerate(record.seed_folders):
        measured = json.loads((folder / records.MEASURED).read_text())
        assert measured["command"] == f"cifar-transfer {record.command} --seed_everything={number}"
        assert (folder / records.LOG).read_text()
    for result in record.results:
        for number, outcome in enumerate(record.outcomes(result)):
            assert outcome["seed"] == number
            assert outcome["versions"]["torch"]
            assert outcome["device"]
            assert not re.search(r"[\s=]/", outcome["command"]), "no path of a machine"


@pytest.fixture
def tiny_record(tmp_path):
    """A record of its own folder, of a run of seconds on drawn pictures."""
    folder = tmp_path / "records" / "tiny"
    folder.mkdir(parents=True)
    (folder / "record.yaml").write_text(
        "title: a tiny run\n"
        "prepare: benchmarks.drawn_photographs photographs --train 2 --test 1\n"
        "command: fit --config=scratch --data=ImageFolderDataModule --data.root=photographs"
        " --model.image_size=32 --model.backbone=shufflenet_v2_x0_5 --model.weights=none"
        " --trainer.max_epochs=1 --trainer.accelerator=cpu --report.figures=false\n"
        "results: {tiny: version_0}\n"
    )
    return records.read_record(folder)


def test_a_record_is_measured_once_for_each_seed(tiny_record, monkeypatch, capsys):
    folder = tiny_record.folder.parent
    records.main(["tiny", "--seeds=2", f"--folder={folder}"])
    assert [outcome["seed"] for outcome in tiny_record.outcomes("tiny")] == [0, 1]
    for outcome in tiny_record.outcomes("tiny"):
        assert outcome["command"].startswith(
            "python -m cifar_transfer fit --config=scratch --data="
        )
    accuracies = tiny_record.accuracies("tiny")
    mean = sum(accuracies) / 2
    claim = f"{mean:.1f} % ({min(accuracies):.1f} to {max(accuracies):.1f}, 2 seeds)"
    assert claim in capsys.readouterr().out
    assert claim in (folder / "README.md").read_text()
    monkeypatch.setattr(
        "subprocess.run", lambda *_, **__: pytest.fail("a measured seed was run again")
    )
    records.main(["tiny", "--seeds=2", f"--folder={folder}"])


def test_a_command_that_fails_leaves_no_record(tiny_record):
    broken = replace(tiny_record, command=f"{tiny_record.command} --model.lr=-1")
    with pytest.raises(SystemExit, match="lr is -1"):
        records.measure(broken, 0, {})
    assert [path.name for path in tiny_record.folder.iterdir()] == [records.DESCRIPTION]


def test_the_same_pictures_are_drawn_each_time(tmp_path):
    for name in ("one", "other"):
        drawn_photographs.main([str(tmp_path / name), "--train=1", "--test=1"])
    pictures = sorted((tmp_path / "one").rglob("*.jpg"))
    assert len(pictures) == 20
    contents = {path.read_bytes() for path in pictures}
    assert len(contents) == 20
    for path in pictures:
        assert (
            path.read_bytes()
            == (tmp_path / "other" / path.relative_to(tmp_path / "one")).read_bytes()
        )


@pytest.mark.whole
@pytest.mark.parametrize("name", ["demo", "photos"])
def test_a_recorded_result_comes_again(name, tmp_path):
    if name == "photos" and not SHARED.exists():
        pytest.skip("needs weights of ImageNet-1k in ../shared")
    record = records.read_record(records.RECORDS / name)
    again = replace(record, folder=tmp_path)
    records.measure(again, 0, {"weights": SHARED / "weights"})
    for result in record.results:
        expected = record.accuracies(result)
        (accuracy,) = again.accuracies(result)
        assert min(expected) - MARGIN <= accuracy <= max(expected) + MARGIN
