"""What Lightning, torch and jsonargparse do not promise: these tests fail when it changes."""

import copy
import csv
from pathlib import Path

import jsonargparse
import pytest
import torch
from conftest import quiet_trainer
from lightning import LightningDataModule
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel, RandomDataset
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.profilers import SimpleProfiler
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.distributed import DistBackendError
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, lr_scheduler
from torch.utils.data import DataLoader

from cifar_transfer.cli import parser_messages
from cifar_transfer.training import lightning_internals


class Model(BoringModel):
    """A module that notes, while it fits, what is known of its trainer."""

    def on_validation_start(self):
        self.fitting_in_validation = lightning_internals.is_fitting(self)


def test_a_module_without_a_trainer_has_none():
    model = Model()
    assert lightning_internals.trainer_of(model) is None
    assert not lightning_internals.is_fitting(model)
    with pytest.raises(RuntimeError, match="not attached"):
        _ = model.trainer


def test_a_module_fits_also_while_it_validates():
    model = Model()
    trainer = quiet_trainer(max_epochs=1, limit_train_batches=1, limit_val_batches=1)
    trainer.fit(model)
    assert lightning_internals.trainer_of(model) is trainer
    assert model.fitting_in_validation
    trainer.validate(model, verbose=False)
    assert not model.fitting_in_validation


def test_a_trainer_lists_its_callbacks():
    trainer = quiet_trainer()
    assert lightning_internals.callbacks_of(trainer) == trainer.callbacks


def test_a_trainer_has_the_data_module_that_it_was_given():
    trainer = quiet_trainer(max_steps=1, limit_val_batches=0)
    assert lightning_internals.data_of(trainer) is None
    data = BoringDataModule()
    trainer.fit(Model(), data)
    assert lightning_internals.data_of(trainer) is data
    assert trainer.datamodule is data


@pytest.mark.parametrize(("fast_dev_run", "trial"), [(False, False), (True, True), (3, True)])
def test_a_trainer_knows_whether_it_only_tries_the_code(fast_dev_run, trial):
    trainer = quiet_trainer(fast_dev_run=fast_dev_run)
    assert lightning_internals.is_trial(trainer) is trial


def test_a_trainer_has_a_profiler():
    profiler = SimpleProfiler()
    assert lightning_internals.profiler_of(quiet_trainer(profiler=profiler)) is profiler
    assert lightning_internals.profiler_of(quiet_trainer()).dirpath is None


class LogsInEachStep(Model):
    """A module that logs in each step, and lowers the interval of the log before the first one."""

    def on_train_start(self):
        self.interval_before = lightning_internals.log_interval(self.trainer)
        lightning_internals.set_log_interval(self.trainer, 2)

    def training_step(self, batch, batch_idx):
        self.log("figure", 1.0)
        return super().training_step(batch, batch_idx)


def test_the_interval_of_the_log_can_be_changed_when_a_fit_has_begun(tmp_path):
    model = LogsInEachStep()
    logger = CSVLogger(tmp_path)
    trainer = quiet_trainer(max_steps=6, limit_val_batches=0, log_every_n_steps=4, logger=logger)
    trainer.fit(model)
    assert model.interval_before == 4
    with Path(logger.log_dir, "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "3", "5"]


class Counts(Model):
    """A module that notes how many batches an epoch has, before and after they are counted."""

    def configure_optimizers(self):
        before = self.trainer.num_training_batches
        self.counts = [before, lightning_internals.count_training_batches(self.trainer)]
        return super().configure_optimizers()


def test_batches_are_counted_before_the_loop_has_set_up_the_data():
    model = Counts()
    quiet_trainer(max_steps=1, limit_train_batches=3, limit_val_batches=0).fit(model)
    assert model.counts == [float("inf"), 3]


def test_schedulers_within_others_are_found():
    optimizer = SGD([nn.Parameter(torch.zeros(1))], 0.1)
    first = lr_scheduler.LinearLR(optimizer)
    second = lr_scheduler.ExponentialLR(optimizer, 0.9)
    chained = lr_scheduler.ChainedScheduler([first, second])
    optimizer.step()
    sequence = lr_scheduler.SequentialLR(
        optimizer, [chained, lr_scheduler.StepLR(optimizer, 1)], [9]
    )
    within = [type(part).__name__ for part in lightning_internals.schedulers_within(sequence)]
    assert within == ["SequentialLR", "ChainedScheduler", "LinearLR", "ExponentialLR", "StepLR"]


def test_a_compiled_module_is_within_its_wrapper():
    module = nn.Linear(1, 1)
    compiled = torch.compile(module, backend="eager")
    assert lightning_internals.uncompiled(compiled) is module
    assert lightning_internals.uncompiled(module) is module
    assert [name for name, _ in compiled.named_modules()] == ["", "_orig_mod"]


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("epochs", [1, 2, 3, 4])
def test_a_plateau_is_reset_as_it_resets_itself(mode, epochs):
    optimizer = SGD([nn.Parameter(torch.zeros(1))], 0.1)
    plateau = lr_scheduler.ReduceLROnPlateau(optimizer, mode, patience=1, cooldown=2)
    for _ in range(epochs):
        plateau.step(1.0)
    expected = copy.copy(plateau)
    expected._reset()
    assert vars(plateau) != vars(expected)
    lightning_internals.reset_plateau(plateau)
    assert vars(plateau) == vars(expected)


class Frozen(Model):
    """A module that freezes its bias after it was wrapped, and then has itself wrapped or not."""

    def __init__(self, wrap):
        super().__init__()
        self.wrap = wrap

    def on_train_start(self):
        before = self.trainer.strategy.model
        assert isinstance(before, DistributedDataParallel)
        self.layer.bias.requires_grad_(False)
        if self.wrap:
            lightning_internals.wrap_again(self.trainer, self)
        after = self.trainer.strategy.model
        assert isinstance(after, DistributedDataParallel)
        assert (after is not before) == self.wrap
        assert after.module is self


@pytest.fixture
def one_process(monkeypatch):
    """A process group of one process, in which wrapped modules train."""
    for name in ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)  # Lightning sets them; they are removed after the test
    yield quiet_trainer(strategy="ddp", devices=1, max_steps=2, limit_val_batches=0)
    torch.distributed.destroy_process_group()


def test_a_wrapper_waits_for_gradients_of_what_was_trainable_when_it_was_made(one_process):
    with pytest.raises(RuntimeError, match="parameters that were not used"):
        one_process.fit(Frozen(wrap=False))


def test_a_module_is_wrapped_again_without_what_is_frozen(one_process):
    one_process.fit(Frozen(wrap=True))
    assert one_process.global_step == 2


def test_a_module_that_was_not_wrapped_is_not_wrapped_again():
    model = Model()
    trainer = quiet_trainer(max_steps=1, limit_val_batches=0)
    trainer.fit(model)
    lightning_internals.wrap_again(trainer, model)
    assert trainer.strategy.model is model


def test_fused_sgd_needs_a_momentum_for_all_parameters_or_none():
    parameters = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = SGD(parameters, 0.1, momentum=0.9, fused=True)
    parameters[0].grad = torch.ones(2)
    optimizer.step()
    parameters[1].grad = torch.ones(2)
    with pytest.raises(TypeError, match="expected Tensor"):
        optimizer.step()
    lightning_internals.complete_momentum(optimizer)
    optimizer.step()
    assert optimizer.state[parameters[1]]["momentum_buffer"].tolist() == [1.0, 1.0]


def test_an_attached_module_is_saved_with_its_data_after_another_one_ran(tmp_path):
    class Data(BoringDataModule):
        def __init__(self):
            super().__init__()
            self.save_hyperparameters({"root": "photos"}, logger=False)

    trainer = quiet_trainer(limit_test_batches=1)
    trainer.test(BoringModel(), verbose=False)
    model = BoringModel()
    lightning_internals.attach(trainer, model, Data())
    assert model.trainer.datamodule.hparams == {"root": "photos"}
    lightning_internals.save_attached(trainer, model, tmp_path / "model.ckpt")
    checkpoint = torch.load(tmp_path / "model.ckpt", weights_only=True)
    torch.testing.assert_close(checkpoint["state_dict"], dict(model.state_dict()))
    assert checkpoint["datamodule_hyper_parameters"] == {"root": "photos"}
    assert "optimizer_states" not in checkpoint


@pytest.mark.parametrize(
    ("options", "temporary"),
    [
        ({"devices": 1}, False),
        ({"devices": 2, "strategy": "ddp"}, False),
        ({"devices": 2, "strategy": "ddp_spawn"}, True),
        ({"devices": 2, "strategy": "ddp_notebook"}, True),
    ],
)
def test_processes_that_end_with_a_function_are_known(options, temporary):
    trainer = quiet_trainer(**options)
    assert lightning_internals.has_temporary_processes(trainer) == temporary


class Saves(Callback):
    """A callback that moves the profiler, and saves after the second step of each epoch."""

    def __init__(self, folder):
        self.folder = folder

    def setup(self, trainer, module, stage):
        lightning_internals.move_profiler(trainer, Path(trainer.log_dir), self.folder)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx == 1:
            trainer.save_checkpoint(self.folder / f"{trainer.current_epoch}.ckpt")


@pytest.fixture
def fitted(tmp_path):
    """Two epochs of three steps, saved amid each epoch and at the end of the best."""
    saves = Saves(tmp_path)
    best = ModelCheckpoint(tmp_path, "best", monitor="train_loss", enable_version_counter=False)
    trainer = quiet_trainer(
        max_steps=6,
        limit_train_batches=3,
        limit_val_batches=1,
        profiler=SimpleProfiler(filename="times"),
        callbacks=[saves, best],
    )
    trainer.fit(LoggedModel())
    return best


class LoggedModel(BoringModel):
    """A module that logs its loss."""

    def training_step(self, batch, batch_idx):
        step = super().training_step(batch, batch_idx)
        self.log("train_loss", step["loss"])
        return step


def test_the_profiler_writes_into_the_folder_that_it_is_moved_to(fitted, tmp_path):
    assert (tmp_path / "fit-times.txt").is_file()


def test_a_checkpoint_tells_whether_its_epoch_was_over(fitted, tmp_path):
    def ended(name):
        checkpoint = torch.load(tmp_path / name, weights_only=True)
        return lightning_internals.ended_epoch(checkpoint)

    assert not ended("0.ckpt")
    assert ended("best.ckpt")


class Tuned(Model):
    """A module that notes the checkpoints that it is loaded from."""

    def __init__(self):
        super().__init__()
        self.lr = 0.1
        self.batch_size = 2
        self.loaded_from = []

    def train_dataloader(self):
        return DataLoader(RandomDataset(32, 64), self.batch_size)

    def on_load_checkpoint(self, checkpoint):
        self.loaded_from.append(self.trainer.ckpt_path)


@pytest.mark.filterwarnings("ignore:.*LeafSpec")
def test_the_checkpoints_of_the_tuner_are_told_by_their_names(tmp_path):
    trainer = quiet_trainer(max_epochs=1, limit_val_batches=0, default_root_dir=tmp_path)
    model = Tuned()
    Tuner(trainer).scale_batch_size(model, max_trials=1, steps_per_trial=1)
    after_sizes = len(model.loaded_from)
    Tuner(trainer).lr_find(model, num_training=3, early_stop_threshold=None)
    assert 0 < after_sizes < len(model.loaded_from), "both load their own"
    assert all(map(lightning_internals.is_temporary, model.loaded_from))
    for of_the_user in (None, "last.ckpt", tmp_path / "best.ckpt"):
        assert not lightning_internals.is_temporary(of_the_user)


class Steps(Callback):
    """A callback that notes the epoch and the batch of each step."""

    def __init__(self):
        self.steps = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.steps.append((trainer.current_epoch, batch_idx))


class EndsEarly(Callback):
    """A callback that saves the epoch in which `max_steps` ends the fit."""

    def __init__(self, path, leave_open):
        self.path = path
        self.leave_open = leave_open

    def on_save_checkpoint(self, trainer, module, checkpoint):
        if self.leave_open:
            lightning_internals.leave_epoch_open(checkpoint)

    def on_train_epoch_end(self, trainer, module):
        trainer.save_checkpoint(self.path)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
@pytest.mark.parametrize(("leave_open", "first"), [(True, (1, 1)), (False, (2, 0))])
def test_an_epoch_that_is_left_open_goes_on(tmp_path, leave_open, first):
    """Lightning by itself begins with the next one."""
    path = tmp_path / "last.ckpt"
    options = {"limit_train_batches": 3, "limit_val_batches": 0}
    quiet_trainer(max_steps=4, callbacks=[EndsEarly(path, leave_open)], **options).fit(Model())
    steps = Steps()
    quiet_trainer(max_epochs=3, callbacks=[steps], **options).fit(Model(), ckpt_path=path)
    assert steps.steps[0] == first


def test_the_state_of_a_model_checkpoint_moves_with_its_folder(fitted, tmp_path):
    best = fitted
    elsewhere = tmp_path / "elsewhere"
    state = lightning_internals.moved_checkpoints(best.state_dict(), str(elsewhere))
    moved = ModelCheckpoint(elsewhere, "best", monitor="train_loss")
    with pytest.warns(UserWarning, match="The dirpath has changed"):
        moved.load_state_dict(best.state_dict())
    assert moved.best_model_score is None
    moved.load_state_dict(state)
    assert moved.best_model_score == best.best_model_score
    assert moved.best_model_path == str(elsewhere / "best.ckpt")
    assert list(moved.best_k_models) == [moved.best_model_path]


def test_a_silent_experiment_takes_all_calls():
    experiment = lightning_internals.silent_experiment()
    assert experiment.add_scalar("loss", 1.0, 0) is None
    assert experiment.flush() is None


def test_half_precision_alone_scales_losses():
    scaled = quiet_trainer(plugins=[MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))])
    assert lightning_internals.has_gradient_scaler(scaled)
    for precision in ("32-true", "bf16-mixed"):
        assert not lightning_internals.has_gradient_scaler(quiet_trainer(precision=precision))


@pytest.fixture
def slurm(monkeypatch):
    """The environment of a SLURM job of one process."""
    for name in ("PROCID", "LOCALID", "NODEID", "JOB_ID"):
        monkeypatch.setenv(f"SLURM_{name}", "0")
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("SLURM_JOB_NAME", "fit")


def test_an_evaluation_in_a_slurm_job_leaves_the_weights_as_they_are(tmp_path, slurm):
    """Lightning by itself takes those of a requeued fit."""
    options = {"limit_val_batches": 1, "default_root_dir": tmp_path}
    trainer = quiet_trainer(max_steps=1, **options)
    trainer.fit(Model())
    trainer.save_checkpoint(tmp_path / "hpc_ckpt_1.ckpt")
    model = Model()
    weights = copy.deepcopy(model.state_dict())
    trainer = quiet_trainer(**options)
    with lightning_internals.without_requeued_state(trainer):
        trainer.validate(model, verbose=False)
    assert torch.equal(model.state_dict()["layer.weight"], weights["layer.weight"])
    trainer.validate(model, verbose=False)
    assert not torch.equal(model.state_dict()["layer.weight"], weights["layer.weight"])


def test_a_slurm_job_goes_on_with_the_checkpoint_that_lightning_takes(tmp_path, slurm):
    options = {"limit_train_batches": 1, "limit_val_batches": 0, "default_root_dir": tmp_path}
    trainer = quiet_trainer(max_epochs=1, **options)
    trainer.fit(Model())
    assert lightning_internals.requeued_checkpoint(tmp_path) is None
    for number in (2, 10):
        trainer.save_checkpoint(tmp_path / f"hpc_ckpt_{number}.ckpt")
    resumed = quiet_trainer(max_epochs=2, plugins=[SLURMEnvironment()], **options)
    taken = lightning_internals.requeued_checkpoint(tmp_path)
    assert taken == tmp_path / "hpc_ckpt_10.ckpt"
    model = Tuned()
    resumed.fit(model)
    assert model.loaded_from == [str(taken)]


def test_outside_of_slurm_no_job_goes_on(tmp_path):
    Path(tmp_path, "hpc_ckpt_1.ckpt").touch()
    assert lightning_internals.requeued_checkpoint(tmp_path) is None


def test_lightning_has_no_handler_that_requeues_outside_of_slurm():
    assert lightning_internals.requeue_handler() is None


def test_lightning_has_a_handler_that_requeues_a_slurm_job(slurm):
    class Witness(Callback):
        def on_train_start(self, trainer, module):
            self.handler = lightning_internals.requeue_handler()

    witness = Witness()
    trainer = quiet_trainer(
        max_steps=1, limit_val_batches=0, callbacks=[witness], plugins=[SLURMEnvironment()]
    )
    trainer.fit(Model())
    assert callable(witness.handler)


def test_an_error_of_gloo_or_nccl_tells_of_a_lost_process():
    of_gloo = RuntimeError(
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed"
    )
    assert lightning_internals.is_lost_process(of_gloo)
    assert lightning_internals.is_lost_process(DistBackendError("NCCL error"))
    assert not lightning_internals.is_lost_process(RuntimeError("out of memory"))


@pytest.fixture
def parser():
    class Parser(LightningArgumentParser):
        def error(self, message, ex=None):
            raise ValueError(message)

    parser = Parser()
    parser.add_argument("--lr", type=float)
    parser.add_class_arguments(ModelCheckpoint, "keep")
    parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True)
    return parser


def refused(parser, *args):
    with pytest.raises(ValueError, match=r"[a-z]") as error:
        parser.parse_args(list(args))
    return str(error.value)


def test_jsonargparse_names_an_option_that_it_does_not_know(parser):
    assert parser_messages.unknown_option(refused(parser, "--lx=3")) == "--lx"
    assert parser_messages.unknown_option(refused(parser, "--lr=fast")) is None


def test_jsonargparse_names_a_key_that_it_does_not_know(parser):
    assert parser_messages.unknown_key(refused(parser, '--keep={"monitr": 3}')) == "monitr"
    message = refused(parser, "--data=LightningDataModule", "--data.batch_siz=3")
    assert parser_messages.unknown_key(message) == "batch_siz"
    assert parser_messages.unknown_key(refused(parser, "--lr=fast")) is None


def test_jsonargparse_says_that_an_import_is_not_allowed(parser):
    jsonargparse.set_parsing_settings(
        import_path_denylist=["*"], import_path_allowlist=["lightning"]
    )
    assert parser_messages.is_import_refusal(refused(parser, "--data=os.system"))
    assert not parser_messages.is_import_refusal(refused(parser, "--lr=fast"))


def test_jsonargparse_says_that_a_class_is_unknown(parser):
    message = refused(parser, "--data=NoSuchModule")
    assert parser_messages.unknown_class(message, "data") == "NoSuchModule"
    assert parser_messages.unknown_class(refused(parser, "--lr=fast"), "data") is None
