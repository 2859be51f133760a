"""The geometry of a classifier's images: settled when training begins, kept in its checkpoints."""

import copy
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from cifar_transfer.base.errors import UserError
from cifar_transfer.data.geometry import GEOMETRY_KEY, Geometry, Size, pixels, statistics
from cifar_transfer.network import build
from cifar_transfer.network.image_classifier import ImageNetwork
from cifar_transfer.training.scoring import ScoredModule


class SizedModule(ScoredModule, ImageNetwork):
    """A classifier whose options are Lightning's `hparams`, and which settles its geometry when training begins."""

    @property
    def largest_side(self) -> int | None:
        """Side in pixels of the largest square that the network is given; None: it takes images as they are."""
        size = self.hparams["image_size"]
        return size and max([size, *(self.hparams["train_sizes"] or [])])

    def on_fit_start(self) -> None:
        """Count the steps that `train_sizes` are shared out over."""
        super().on_fit_start()
        if self.hparams["train_sizes"]:
            if self.trainer.estimated_stepping_batches == float("inf"):
                raise UserError(
                    "train_sizes are shared out over the run: set --trainer.max_epochs."
                )
            self._all_steps = int(self.trainer.estimated_stepping_batches)

    def train_side(self) -> int | None:
        """The side that images have in this step of the training."""
        steps = (
            (self.trainer.global_step, self._all_steps) if self.hparams["train_sizes"] else (0, 1)
        )
        return self.side_at(*steps)

    def side_at(self, done: int, of: int) -> int | None:
        """The side that images have when so much of the training is done."""
        sizes = self.hparams["train_sizes"] or [self.geometry.input_side]
        return sizes[min(len(sizes) * done // of, len(sizes) - 1)]

    def try_sizes(self) -> None:
        """Refuse, by a `UserError`, sizes that the network cannot take."""
        training, size = self.training, self.geometry.size
        try:
            with torch.no_grad():
                for side in {self.hparams["image_size"], *(self.hparams["train_sizes"] or [])}:
                    self.eval().all_logits(torch.zeros(1, 3, *size, device=self.device), side)
                if self.hparams[
                    "aux_weight"
                ]:  # auxiliary heads need larger images, and answer only while training
                    images = torch.zeros(2, 3, *self.geometry.input_size, device=self.device)
                    copy.deepcopy(self.network).train()(images)
        except (RuntimeError, AssertionError) as error:
            name, why = self.hparams["backbone"], str(error).splitlines()[0]
            raise UserError(
                f"{name} cannot take images of {side or pixels(size)} pixels ({why}): {build.size_hint(name)}"
            ) from None
        self.train(training)

    def settle_statistics(self, data: object) -> None:
        """Take the statistics of the data module, or else of the weights, if none were asked for."""
        if self.hparams["normalize"] is None:
            chosen = self.hparams["normalize"] = (
                getattr(data, "statistics", None) or self.weights_statistics
            )
            mean, std = statistics(chosen)
            self.geometry = replace(self.geometry, mean=mean, std=std)
            for buffer, values in ((self.mean, mean), (self.std, std)):
                buffer.copy_(torch.tensor(values).view(3, 1, 1))

    def tell_unlike(self) -> None:
        """Say in what the images are unlike those that the weights come from, and that the adaptation was made for."""
        now = self.geometry
        if self.saved:
            before = Geometry.of(
                {"hyper_parameters": self.saved, "input_size": self.saved["input_size"]}
            )
            if (sizes := [pixels(before.input_size), pixels(now.input_size)])[0] != sizes[1]:
                seen = f"from images of {sizes[0]} pixels, and the network now sees {sizes[1]}"
                rank_zero_info(f"The weights come {seen}: set --model.image_size if it should not.")
            if [*before.mean, *before.std] != [*now.mean, *now.std]:
                rank_zero_info(
                    "The weights come from images of other statistics: see --model.normalize."
                )
        assumed = self.hparams["image_size"] is None and max(now.size) != build.ASSUMED
        if assumed and any(f"{build.ASSUMED} pixels" in change for change in self.changes):
            made = f"adapted to images of {build.ASSUMED} pixels, and these have {pixels(now.size)}"
            rank_zero_warn(f"The network was {made}: set --model.image_size.")

    def settle_size(self, size: Size) -> None:
        """Of images as they are decoded; of a checkpoint that says the same nothing changes."""
        height, width = size
        if not self.sized or self.geometry.size != (height, width):
            self.geometry = replace(self.geometry, size=(height, width), stretch=False)
        self.sized = True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the geometry."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[GEOMETRY_KEY] = self.geometry.saved()
        checkpoint["input_size"] = list(self.geometry.size)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the size of the checkpoint's images; all else in a geometry follows from the options.

        Raises:
            UserError: The data have settled on another one, and it is not a training that continues.
        """
        super().on_load_checkpoint(checkpoint)
        fitting = self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING
        saved, own = Geometry.of(checkpoint), self.geometry
        if not self.sized or saved.size == own.size:
            self.take_size(checkpoint)
        elif saved.input_side == own.input_side and not fitting:
            raise UserError(
                f"The checkpoint was trained on images decoded to {pixels(saved.size)} pixels, and the data give "
                f"{pixels(own.size)}: set data.fixed_size = {saved.size} before."
            )
