"""What the benchmarks print and draw, from times and runs that are known."""

import pytest
from conftest import TINY
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks import pipeline, recipes, turns


def test_contestants_take_turns_and_the_first_round_does_not_count():
    calls = []
    times = turns.alternate(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3, most=60
    )
    assert calls == list("ababbaab")
    assert [len(values) for values in times.values()] == [3, 3]


def test_no_round_begins_after_the_time_is_up():
    assert len(turns.alternate({"a": lambda: None}, rounds=1000, most=0)["a"]) == 1


def test_ratios_are_those_within_a_round():
    table = turns.table({"slow": [1.0, 2.0, 4.0], "fast": [0.5, 1.0, 1.0]}, images=10)
    slow, fast = table.splitlines()[2:]
    assert [cell.strip() for cell in slow.split("|")[1:-1]] == [
        "slow",
        "5",
        "4 to 8",
        "1.00",
        "1.00 to 1.00",
    ]
    assert [cell.strip() for cell in fast.split("|")[1:-1]] == [
        "fast",
        "10",
        "10 to 15",
        "2.00",
        "2.00 to 3.00",
    ]


@pytest.mark.slow
def test_fit_is_timed_beside_the_tutorials_loop_in_both_phases(monkeypatch, capsys):
    monkeypatch.setattr(pipeline, "CHUNK", 2)
    monkeypatch.setattr(pipeline, "ROUNDS", 2)
    monkeypatch.setattr(pipeline, "WARM", 1)
    options = ["--model.backbone=lenet5", "--data.batch_size=8", "--trainer.accelerator=cpu"]
    monkeypatch.setattr("sys.argv", ["pipeline", *options])
    pipeline.main()
    printed = capsys.readouterr().out
    assert printed.index("\nfrozen, ") < printed.index("\nunfrozen, ")
    for contestant in ("tutorial's loop", "fit", "floor"):
        assert printed.count(f"| {contestant} ") == 2
    assert printed.count("of the floor's images/s") == 2


@pytest.mark.slow
def test_recipes_are_run_once_evaluated_each_epoch_and_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(recipes.RECIPES, "fast", ["--model.schedule=linear"])
    options = [
        "--out",
        str(tmp_path),
        "--recipes",
        "fast",
        *TINY,
        "--trainer.max_epochs=2",
        "--trainer.log_every_n_steps=2",
    ]
    monkeypatch.setattr("sys.argv", ["recipes", "--out", str(tmp_path), *options])
    recipes.main()
    run = tmp_path / "fast-0" / "lightning_logs" / "version_0"
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    rates = [event.value for event in events.Scalars("lr-Adam")]
    assert rates == sorted(rates, reverse=True)
    points = recipes.curve(run)
    assert len(points) == 2
    assert 0 < points[0][0] < points[1][0]
    assert f"{points[1][1]:.2%}" in capsys.readouterr().out
    with Image.open(tmp_path / "recipes.png") as picture:
        assert picture.size == (1200, 675)
    monkeypatch.setattr(
        "subprocess.run", lambda *_, **__: pytest.fail("a finished run was started again")
    )
    recipes.main()
