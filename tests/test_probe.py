"""Features of frozen backbones, heads on them, and the checkpoints that these become."""

import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import RUN, TINY, quiet_trainer, run_fit, untouched, weights
from test_terminal import on_terminal

from cifar_transfer import Classifier, ShapesDataModule, TransferClassifier
from cifar_transfer.base.errors import UserError
from cifar_transfer.commands.evaluate import evaluate
from cifar_transfer.features import heads
from cifar_transfer.features.extract import FeatureExtractor, Features, features
from cifar_transfer.features.store import FeatureFile, make_room

SIZES = {"train_images": 300, "test_images": 70}
NETWORK = "shufflenet_v2_x0_5"


def extract(folder, views=1, seed=0, limit_gb=1.0, **options):
    torch.manual_seed(seed)
    data = ShapesDataModule(**SIZES | options)
    model = TransferClassifier(NETWORK, "none", class_names=data.class_names, image_size=64)
    extractor = FeatureExtractor(model, data, folder, views, limit_gb)
    return features(quiet_trainer(use_distributed_sampler=False), extractor), extractor


@pytest.fixture(autouse=True)
def _in_float32(monkeypatch):
    """Whatever the processor."""
    monkeypatch.setattr(FeatureExtractor, "_faster_in_bfloat16", lambda self: False)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.bin")}


def test_features_are_what_comes_into_the_head(tmp_path):
    found, extractor = extract(tmp_path, views=3)
    model, data = extractor.classifier, extractor.data
    head = model.network.fc
    with torch.inference_mode():
        for split, exact in (("train", False), ("val", True), ("test", True)):
            images = (
                data.images[split].__getitems__(range(len(data.images[split])))[0].float() / 255
            )
            logits = head(torch.from_numpy(np.array(found[split].views[0], np.float32)))
            torch.testing.assert_close(logits, model(images), atol=1e-5 if exact else 0.05, rtol=0)
            assert found[split].views[0].dtype == (np.float32 if exact else np.float16)
            if split == "train":
                plain, mirrored, augmented = found[split].views
                seen = head(torch.from_numpy(np.array(mirrored, np.float32)))
                torch.testing.assert_close(seen, model(images.flip(3)), atol=0.05, rtol=0)
                assert not np.array_equal(augmented, plain)
                assert not np.array_equal(augmented, mirrored)
    assert [len(found[split].views) for split in ("val", "test")] == [1, 1]
    assert extractor.computed == 3 * len(found["train"].labels) + len(found["val"].labels) + 70


def test_what_is_there_is_not_computed_again(tmp_path, monkeypatch):
    first, extractor = extract(tmp_path, views=3)
    whole = files(tmp_path)
    assert len(whole) == 5
    assert extract(tmp_path, views=3)[1].computed == 0

    written, write = [], FeatureFile.write

    def killed(self, number, values):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(number)
        write(self, number, values)

    monkeypatch.setattr("cifar_transfer.features.extract.BATCH_PIXELS", 64 * 64 * 20)
    monkeypatch.setattr(FeatureFile, "write", killed)
    other = tmp_path / "other"
    with pytest.raises(SystemExit, match=r"^1$"):  # Lightning's, of a KeyboardInterrupt
        extract(other, views=3)
    monkeypatch.setattr(FeatureFile, "write", write)
    again, extractor = extract(other, views=3)
    assert (
        extractor.computed
        == 3 * len(first["train"].labels) + len(first["val"].labels) + 70 - 3 * 20
    )
    for split in first:
        for one, two in zip(first[split].views, again[split].views, strict=True):
            np.testing.assert_allclose(one, two, atol=2e-2 if split == "train" else 1e-4)


def test_a_damaged_batch_is_computed_anew_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr("cifar_transfer.features.extract.BATCH_PIXELS", 64 * 64 * 20)
    extract(tmp_path)
    whole = files(tmp_path)
    path = max(tmp_path.glob("*.bin"), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[1024 * 2 * 25] ^= 1  # of the second batch
    path.write_bytes(content)
    _, extractor = extract(tmp_path)
    assert extractor.computed == 20
    assert files(tmp_path) == whole
    path.write_bytes(content[:-100])
    assert extract(tmp_path)[1].computed > 200
    assert files(tmp_path) == whole


@pytest.mark.parametrize("change", [{"seed": 1}, {"train_images": 301}, {"task": "upstream"}])
def test_other_weights_or_images_have_other_features(tmp_path, change):
    extract(tmp_path)
    before = {*files(tmp_path)}
    _, extractor = extract(tmp_path, **change)
    assert {*files(tmp_path)} - before
    assert extractor.computed >= 200


def test_the_precision_once_chosen_is_kept(tmp_path, monkeypatch):
    exact, _ = extract(tmp_path / "exact")
    monkeypatch.setattr(FeatureExtractor, "_faster_in_bfloat16", lambda self: True)
    half, _ = extract(tmp_path / "half")
    assert not np.array_equal(exact["train"].views[0], half["train"].views[0])
    np.testing.assert_array_equal(exact["val"].views[0], half["val"].views[0])
    monkeypatch.setattr(
        FeatureExtractor, "_faster_in_bfloat16", lambda self: pytest.fail("it is chosen")
    )
    assert extract(tmp_path / "half")[1].computed == 0
    assert extract(tmp_path / "exact")[1].computed == 0


def test_old_features_make_room_and_nothing_of_others_goes(tmp_path):
    names = [f"features-{number:032x}.bin" for number in range(3)]
    for number, name in enumerate([*names, "features-mine.bin", "notes.bin"]):
        (tmp_path / name).write_bytes(bytes(1000))
        os.utime(tmp_path / name, (number, number))
    (tmp_path / f"features-{9:032x}.bin").write_bytes(bytes(1000))  # of another process, just now
    make_room(tmp_path, 500, [tmp_path / names[0]], limit_gb=1.6e-6)
    assert {path.name for path in tmp_path.iterdir()} == {
        *(names[0], names[2], f"features-{9:032x}.bin"),
        *("features-mine.bin", "notes.bin"),
    }
    with pytest.raises(UserError, match=r"0\.0 GB in .*more than limit_gb=1e-06: raise it"):
        make_room(tmp_path, 2000, [], limit_gb=1e-6)


@pytest.fixture
def drawn(monkeypatch):
    """Features of four classes, unequal, in blocks of seven."""
    monkeypatch.setattr(heads, "BLOCK", 7)
    rng = np.random.default_rng(0)
    centres = 0.7 * rng.normal(size=(4, 6)) * [1, 10, 0.1, 1, 1, 1]

    def some(count):
        labels = np.sort(rng.choice(4, count, p=[0.4, 0.3, 0.2, 0.1]))
        values = centres[labels] + rng.normal(size=(count, 6)) * [1, 10, 0.1, 1, 1, 1] + 3
        return Features([values.astype(np.float32)], labels)

    return some(93), some(40), some(50)


def test_logistic_regression_is_at_its_minimum(drawn):
    train, val, _ = drawn
    mean, deviation = heads.moments(train)
    values = torch.from_numpy(train.views[0])
    torch.testing.assert_close(mean, values.mean(0))
    torch.testing.assert_close(deviation, values.std(0, correction=0))
    head, penalty = heads.logistic(train, val, 4, (mean, deviation), (0.1,))
    assert penalty == 0.1
    deviation = deviation.clamp_min(heads.LEAST * deviation.median())
    logits = head.logits(train).requires_grad_()
    weight = head.weight * deviation
    loss = F.cross_entropy(logits, torch.from_numpy(train.labels))
    (errors,) = torch.autograd.grad(loss, logits)
    gradient = errors.T @ ((values - mean) / deviation) + 0.1 * weight
    assert gradient.abs().max() < 1e-4
    assert errors.sum(0).abs().max() < 1e-4
    assert heads.accuracy(logits, train.labels) > 0.7


def test_a_feature_that_is_nearly_always_the_same_gets_no_large_weight(drawn):
    train, val, _ = drawn
    rare = np.random.default_rng(0).random((len(train.labels), 1)) < 0.02
    views = [np.hstack([train.views[0], np.where(rare, 1e-4, 0).astype(np.float32)])]
    seen = heads.Features(
        [np.hstack([val.views[0], np.zeros((len(val.labels), 1), np.float32)])], val.labels
    )
    head, _ = heads.logistic(
        heads.Features(views, train.labels),
        seen,
        4,
        heads.moments(heads.Features(views, train.labels)),
    )
    largest = head.weight[:, :-1].abs().max()
    assert head.weight[:, -1].abs().max() < 10 * largest


def test_the_penalty_is_that_of_the_held_out_images(drawn):
    train, val, _ = drawn
    standard = heads.moments(train)
    head, penalty = heads.logistic(train, val, 4, standard)
    alone = []
    for each in heads.PENALTIES:
        single, _ = heads.logistic(train, val, 4, standard, (each,))
        alone.append(heads.accuracy(single.logits(val), val.labels))
        if each == penalty:
            torch.testing.assert_close(single.logits(val), head.logits(val), atol=0.05, rtol=0)
    assert heads.accuracy(head.logits(val), val.labels) == pytest.approx(max(alone), abs=0.03)


def test_neighbours_and_means_are_those_of_plain_loops(drawn):
    train, _, test = drawn
    mean, deviation = standard = heads.moments(train)
    votes = heads.nearest_neighbours(train, test, 4, standard)
    scores = heads.nearest_mean(train, test, 4, standard)
    known, asked = ((part.views[0] - mean.numpy()) / deviation.numpy() for part in (train, test))
    means = np.stack([known[train.labels == label].mean(0) for label in range(4)])
    for row, one in enumerate(asked):
        assert scores[row].argmax() == np.square(means - one).sum(1).argmin()
        likeness = known @ one / np.linalg.norm(known, axis=1)
        order = np.argsort(-likeness)
        for k in heads.NEIGHBOURS:
            nearest = train.labels[order[:k]]
            counts = np.bincount(nearest, minlength=4)
            near = np.bincount(nearest, likeness[order[:k]] / np.linalg.norm(one), minlength=4)
            assert votes[k][row].argmax() == max(
                range(4), key=lambda label: (counts[label], near[label])
            )


def test_few_shots_draw_so_many_of_each_class(drawn, monkeypatch):
    train, val, test = drawn
    seen = []
    logistic = heads.logistic
    monkeypatch.setattr(
        heads, "logistic", lambda some, *rest: seen.append(some) or logistic(some, *rest)
    )
    scores = heads.few_shot(train, val, test, 4, heads.moments(train))
    least = np.bincount(train.labels).min()
    assert [*scores] == [str(shots) for shots in heads.SHOTS if shots <= least]
    assert len(scores) > 1
    for number, some in enumerate(seen):
        assert set(np.bincount(some.labels)) == {heads.SHOTS[number // heads.DRAWS]}
    assert len({some.views[0].tobytes() for some in seen}) == len(seen)


def test_a_network_with_two_heads_gives_the_logits_of_the_head(tmp_path):
    pytest.importorskip("timm", reason="timm is an optional extra")
    data = ShapesDataModule(train_images=60, test_images=20)
    model = TransferClassifier(
        "timm/deit_tiny_distilled_patch16_224", "none", class_names=data.class_names
    )
    extractor = FeatureExtractor(model, data, tmp_path)
    found = features(quiet_trainer(use_distributed_sampler=False), extractor)
    width = found["test"].views[0].shape[1]
    head = heads.Linear(torch.randn(10, width), torch.randn(10))
    extractor.put(head, found["val"])
    images = data.images["test"].__getitems__(range(20))[0].float() / 255
    with torch.inference_mode():
        torch.testing.assert_close(model(images), head.logits(found["test"]), atol=1e-4, rtol=1e-4)


def test_a_head_that_is_not_linear_is_refused(tmp_path):
    model = TransferClassifier("squeezenet1_1", "none")
    with pytest.raises(
        UserError, match="squeezenet1_1 cannot be probed, because its head is no linear layer"
    ):
        FeatureExtractor(model, ShapesDataModule(), tmp_path)


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probe")
    done = run_fit(
        folder,
        *(
            f"{NETWORK}=none",
            "squeezenet1_1=none",
            "--model.image_size=64",
            "--features=kept",
            *TINY[2:],
        ),
        command="probe",
        expect=1,
    )
    return folder, done


def test_the_checkpoint_has_the_accuracy_of_the_probe(probed, monkeypatch):
    folder, done = probed
    monkeypatch.chdir(folder)
    home = folder / "lightning_logs" / "probe" / f"{NETWORK}-from-scratch"
    result = json.loads((home / "result.json").read_text())
    ckpt = home / "checkpoints" / "best.ckpt"
    for split in ("val", "test"):
        scores = evaluate(str(ckpt), split, accelerator="cpu", figures=False)
        assert scores[f"{split}/acc"] == pytest.approx(result[split], abs=1e-7)
    images, labels = (
        ShapesDataModule(train_images=200, test_images=50).load("test").__getitems__(range(50))
    )
    classifier = Classifier.load(ckpt, "cpu")
    said = [classifier.names.index(rows[0][0]) for rows in classifier.predict([*images])]
    assert np.mean(np.array(said) == labels.numpy()) == pytest.approx(result["test"], abs=1e-7)
    assert f"{100 * result['test']:.2f}" in done.stdout
    assert str(ckpt.relative_to(folder)) in done.stdout


def test_a_failure_loses_no_other(probed):
    folder, done = probed
    assert "squeezenet1_1 cannot be probed" in done.stderr
    lines = (folder / "lightning_logs" / "probe" / "probe.md").read_text().splitlines()
    assert len(lines) == 4
    assert NETWORK in lines[2]
    assert "squeezenet1_1, from scratch: failed" in lines[3]
    assert (folder / "lightning_logs" / "probe" / "probe.png").stat().st_size > 5000


def test_another_recipe_needs_another_folder_and_the_same_one_adds_to_the_table(probed, tmp_path):
    folder, _ = probed
    shutil.copytree(folder / "lightning_logs", tmp_path / "lightning_logs")
    shutil.copytree(folder / "kept", tmp_path / "kept")
    options = ["--model.image_size=64", "--features=kept", *TINY[2:]]
    with untouched(tmp_path):
        done = run_fit(
            tmp_path, f"{NETWORK}=none", *options, "--data.batch_size=8", command="probe", expect=2
        )
    assert (
        "holds results of another recipe (recipe.json): name another folder with --out"
        in done.stderr
    )
    home = tmp_path / "lightning_logs" / "probe" / f"{NETWORK}-from-scratch"
    shutil.copy(home / "recipe.json", tmp_path / "kept.json")
    (home / "recipe.json").write_text(
        '{"options": ["--model.weights=another/w.pth"]}'
    )  # of the same name
    with untouched(tmp_path):
        done = run_fit(tmp_path, f"{NETWORK}=none", *options, command="probe", expect=2)
    assert f"{NETWORK}-from-scratch holds results of another recipe" in done.stderr
    shutil.copy(tmp_path / "kept.json", home / "recipe.json")
    done = run_fit(tmp_path, "shufflenet_v2_x1_0=none", *options, command="probe")
    lines = (tmp_path / "lightning_logs" / "probe" / "probe.md").read_text().splitlines()
    assert {line.split(",")[0].strip("| ") for line in lines[2:]} == {NETWORK, "shufflenet_v2_x1_0"}
    assert done.stdout.count("best.ckpt") == 2


@pytest.mark.slow
def test_two_processes_compute_the_same_features(tmp_path):
    options = [f"{NETWORK}=none", "--model.image_size=64", *TINY[2:], "--features=kept"]
    for devices in (1, 2):
        (tmp_path / str(devices)).mkdir()
        if devices == 2:
            as_precise(tmp_path / "1", tmp_path / "2" / "kept")
        one = [*options, f"--trainer.devices={devices}", f"--out={tmp_path / str(devices)}"]
        run_fit(tmp_path / str(devices), *one, command="probe")
    one, two = files(tmp_path / "1" / "kept"), files(tmp_path / "2" / "kept")
    assert len(one) == 3
    assert one == two
    results = [
        json.loads(path.read_text())
        for path in sorted(tmp_path.glob(f"*/{NETWORK}-from-scratch/result.json"))
    ]
    figures = [
        {name: found for name, found in result.items() if "seconds" not in name}
        for result in results
    ]
    assert figures[0] == figures[1]
    assert len(figures) == 2


@pytest.mark.parametrize("option", ["--resume=RUN", "--ckpt_path=RUN/checkpoints/last.ckpt"])
def test_what_is_for_fit_alone_is_refused(run, tmp_path, option):
    shutil.copytree(run / RUN, tmp_path / "run")
    option = option.replace("RUN", str(tmp_path / "run"))
    with untouched(tmp_path):
        done = run_fit(tmp_path, f"{NETWORK}=none", option, *TINY[2:], command="probe", expect=2)
    assert f"error: {option.partition('=')[0]} is for fit: leave it out." in done.stderr


def test_fit_goes_on_from_the_probes_head(probed, tmp_path):
    folder, _ = probed
    ckpt = (
        folder
        / "lightning_logs"
        / "probe"
        / f"{NETWORK}-from-scratch"
        / "checkpoints"
        / "best.ckpt"
    )
    still = [
        "--model.lr=1e-30",
        "--freeze.unfreeze_epoch=0",
        "--trainer.max_epochs=1",
        "--model.image_size=64",
    ]
    run_fit(tmp_path, *TINY, f"--model.weights={ckpt}", *still)
    names = ("classifier.network.fc.weight", "classifier.network.conv5.0.weight")
    before, after = weights(ckpt), weights(tmp_path / RUN / "checkpoints" / "last.ckpt")
    for name in names:
        torch.testing.assert_close(after[name], before[name])


def test_on_a_terminal_too(tmp_path):
    options = [f"{NETWORK}=none", "squeezenet1_1=none", *TINY[2:], "--features=kept"]
    written = on_terminal(tmp_path, 80, *options, command="probe", expect=1)
    lines = [line for line in re.split(r"[\r\n]+", written) if line.startswith("|")]
    assert len(lines) == 4
    assert max(map(len, lines)) < 80, "no line of the table wraps"
    assert "squeezenet1_1, from scratch: failed" in lines[3]


def test_features_beyond_half_precision_are_refused(drawn):
    train, _, _ = drawn
    values = train.views[0].copy()
    values[3, 2] = np.inf
    with pytest.raises(UserError, match=r"NaN, infinite or above 65,504"):
        heads.moments(train._replace(views=[values]))


def test_a_network_that_does_more_with_its_logits_is_refused(tmp_path):
    found, extractor = extract(tmp_path)
    head = heads.Linear(torch.randn(10, found["val"].views[0].shape[1]), torch.randn(10))
    extractor.classifier.network.fc.register_forward_hook(
        lambda module, inputs, logits: logits.relu()
    )
    with pytest.raises(UserError, match="does more with its head's logits"):
        extractor.put(head, found["val"])


def as_precise(probed, kept):
    """Have features in a new folder take the precision that those of the probe took."""
    kept.mkdir(parents=True)
    for path in (probed / "kept").iterdir():
        (kept / path.name).touch()


def test_options_of_training_do_not_cut_or_round_the_features(probed, tmp_path):
    folder, _ = probed
    as_precise(folder, tmp_path / "kept")
    cut = ["--features=kept"]
    cut += [
        "--trainer.limit_test_batches=1",
        "--trainer.fast_dev_run=true",
        "--trainer.precision=bf16-true",
    ]
    run_fit(tmp_path, f"{NETWORK}=none", "--model.image_size=64", *TINY[2:], *cut, command="probe")
    figures = [
        json.loads(
            (each / "lightning_logs/probe" / f"{NETWORK}-from-scratch" / "result.json").read_text()
        )
        for each in (folder, tmp_path)
    ]
    timed = ("feature_seconds", "head_seconds", "bfloat16")
    assert {k: v for k, v in figures[0].items() if k not in timed} == {
        k: v for k, v in figures[1].items() if k not in timed
    }


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--features=FILE"], "error: --features .* cannot be made a folder"),
        (
            ["--out=FILE"],
            "error: .* cannot be written, because .* is no folder: name another place with --out=FOLDER",
        ),
        (["--limit_gb=nan"], "error: --limit_gb is nan: take a positive number"),
        ([f"{NETWORK}=none"], "error: Two of the backbones have one name"),
    ],
)
def test_what_would_lose_the_features_is_refused_before(tmp_path, options, match):
    (tmp_path / "file").touch()
    options = [option.replace("FILE", str(tmp_path / "file")) for option in options]
    done = run_fit(tmp_path, f"{NETWORK}=none", *options, *TINY[2:], command="probe", expect=2)
    assert re.search(match, done.stderr), done.stderr
    assert "Traceback" not in done.stderr


def heads_of(folder, monkeypatch, state, *options):
    """A run of `freeze.probe`, from these weights but for the head, that learns nothing."""
    torch.save(
        {k: v for k, v in state.items() if not k.startswith("classifier.network.fc.")},
        folder / "backbone.pth",
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    still = [
        "--model.image_size=64",
        "--freeze.unfrozen_lr=1e-30",
        "--trainer.max_epochs=1",
        "--freeze.probe=true",
    ]
    still += ["--model.weights=backbone.pth"]
    return run_fit(folder, *TINY, *still, *options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--trainer.devices=1"], "Epoch 1: everything at rate 1e-30"),
        (["--trainer.devices=2"], "Epoch 1: everything at rate 1e-30"),
        (["--freeze.unfreeze_epoch=0", "--model.lr=1e-30"], "Epoch 1: everything, "),
    ],
    ids=["one process", "two", "never frozen"],
)
def test_a_fit_may_begin_with_the_probes_head(probed, tmp_path, monkeypatch, options, said):
    as_precise(probed[0], tmp_path / "cache" / "cifar_transfer" / "features")
    folder, _ = probed
    best = weights(
        folder
        / "lightning_logs"
        / "probe"
        / f"{NETWORK}-from-scratch"
        / "checkpoints"
        / "best.ckpt"
    )
    done = heads_of(tmp_path, monkeypatch, best, *options)
    assert said in done.stdout
    fitted = weights(tmp_path / RUN / "checkpoints" / "last.ckpt")
    torch.testing.assert_close(
        fitted["classifier.network.fc.weight"], best["classifier.network.fc.weight"]
    )
    torch.testing.assert_close(
        fitted["classifier.network.conv5.0.weight"], best["classifier.network.conv5.0.weight"]
    )


@pytest.mark.slow
def test_a_resumed_fit_keeps_its_head(tmp_path, monkeypatch):
    heads_of(tmp_path, monkeypatch, TransferClassifier(NETWORK, weights="none").state_dict())
    before = weights(tmp_path / RUN / "checkpoints" / "last.ckpt")
    shutil.rmtree(tmp_path / "cache")
    done = run_fit(tmp_path, f"--resume={RUN}", "--trainer.max_epochs=2")
    assert "Features of" not in done.stderr
    after = weights(tmp_path / RUN / "checkpoints" / "last.ckpt")
    torch.testing.assert_close(
        after["classifier.network.fc.weight"], before["classifier.network.fc.weight"]
    )


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            ["--freeze.phases=gradual"],
            "error: --freeze.probe=true is in place of the frozen epochs",
        ),
        (["--trainer.precision=bf16-true"], "error: .*probe=true needs a network in 32 bits"),
        ([], "error: .*probe=true needs a backbone that has learned something, not .*weights=none"),
    ],
)
def test_a_probe_that_cannot_be_is_refused(tmp_path, monkeypatch, options, match):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    done = run_fit(tmp_path, *TINY, "--freeze.probe=true", *options, expect=2)
    assert re.search(match, done.stderr), done.stderr
