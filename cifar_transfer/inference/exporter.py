"""A trained network as a file for other programs, which is checked before it gets its name.

Weights alone (`state_dict`, `safetensors`) fit the library's own network, as its users build it. A
graph (`onnx`, `torch_export`) needs none of this project's code and takes any number of images.
"""

import os
import secrets
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models

from cifar_transfer.base.errors import UserError, first_line
from cifar_transfer.base.files import write_json
from cifar_transfer.data.geometry import STATISTICS, Geometry, resize
from cifar_transfer.inference import export_files
from cifar_transfer.network import catalog
from cifar_transfer.network.build import INCEPTION_NAMES
from cifar_transfer.network.image_classifier import ImageClassifier
from cifar_transfer.network.lenet import lenet5
from cifar_transfer.network.mirrored import Mirrored
from cifar_transfer.network.temperature import Calibrated
from cifar_transfer.training.checkpoint_file import load_classifier

ENDINGS = {  # of the files of each format
    "state_dict": ".pth",
    "safetensors": ".safetensors",
    "onnx": ".onnx",
    "torch_export": ".pt2",
}
# What to take in the place of formats that people ask for.
INSTEAD = {
    "torchscript": "torch_export, which PyTorch has in its place",
    "jit": "torch_export, which PyTorch has in the place of TorchScript",
    "pt2": "torch_export",
    "pt": "state_dict for weights alone, or torch_export for a graph",
    "pth": "state_dict",
    "pytorch": "state_dict for weights alone, or torch_export for a graph",
    "coreml": "torch_export, which coremltools converts",
    "openvino": "onnx, which OpenVINO reads",
    "tensorrt": "onnx, which TensorRT reads",
}
GRAPHS = ("onnx", "torch_export")
# What the notes say of the logits of a graph, and of those of weights alone.
GRAPH_LOGITS = "They are divided by the temperature already; their softmax is the probabilities."
WEIGHTS_LOGITS = "Divide them by the temperature; their softmax is then the probabilities."
BATCH_SIZES = (1, 2, 5)  # of the random images that a file is tried with
# Largest difference of a logit, as a share of the largest logit. In float32, sums in another order
# differ by a hundredth of that.
TOLERANCE = 1e-4


class Exporter:
    """Writes the network of a checkpoint in another format, and tries the file.

    Args:
        ckpt: The checkpoint.
        to: The format, one of `ENDINGS`.
        out: The file; None for the name of the checkpoint with the ending of the format.
        preprocess: Put resizing and normalisation into a graph. Weights alone hold neither.
        mirrored: Have a graph look at each image and its mirror image, see `Mirrored`.

    Attributes:
        path: The file.
        notes: What a program has to know beside the network. They are stored with it.

    Raises:
        UserError: There is no such format, the checkpoint is unfit, a package is missing, the
            format cannot hold the network, or the file cannot be that of the format.
    """

    def __init__(
        self,
        ckpt: Path,
        to: str,
        out: Path | None,
        preprocess: bool,
        mirrored: bool = False,
    ) -> None:
        _check_format(to)
        if mirrored and to not in GRAPHS:
            raise UserError(
                f"{to} holds weights alone, and no mirror image: leave mirrored out, or take "
                f"{' or '.join(GRAPHS)}."
            )
        if to == "onnx":
            _require_onnx()
        self._format = to
        self._classifier = load_classifier(ckpt)
        self.path = out or ckpt.with_suffix(ENDINGS[to])
        _check_path(self.path, to, ckpt)
        if to in GRAPHS:
            self._preprocess = preprocess
            self._geometry = self._classifier.geometry
        else:
            _require_library_network(self._classifier)
            self._preprocess = False
            self._geometry = library_geometry(self._classifier)
        self._mirrored = mirrored
        self.notes = self._describe()

    def _describe(self) -> dict[str, Any]:
        example = self._network_input(self._random_images(1))
        channels, height, width = example.shape[1:]
        described_input = f"float32 [batch, {channels}, {height}, {width}], RGB in [0, 1]"
        if not self._preprocess:
            described_input += ", then (x - mean) / std of each channel"
        described_logits = WEIGHTS_LOGITS
        if self._format in GRAPHS:
            described_logits = GRAPH_LOGITS
        return {
            "backbone": self._classifier.backbone,
            "class_names": self._classifier.class_names,
            "input": described_input,
            "input_shape": ["batch", channels, height, width],
            "preprocess": self._preprocess,
            "mirrored": self._mirrored,
            "temperature": self._classifier.temperature,
            "logits": described_logits,
            **self._geometry.describe(self._preprocess),
        }

    def export(self) -> float | None:
        """Write the file and try it on random images.

        Returns:
            The largest difference of a logit between the file and the checkpoint, or None if there
            is no onnxruntime to run the file.

        Raises:
            UserError: The network cannot be written in this format, the file does not give the
                logits of the checkpoint, or there is no place for it. What was there before stays.
        """
        partial = self.path.with_name(f"partial-{secrets.token_hex(8)}.{self.path.name}")
        try:
            partial.touch()
            self._write(partial)
            difference = self._try(partial)
            if self._format == "state_dict":
                write_json(self.path.with_suffix(".json"), self.notes)
            os.replace(partial, self.path)
        except UserError:
            raise
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be written ({error.strerror}): name another file with --out."
            ) from None
        except Exception as error:  # of any kind, from tracing somebody's network
            raise UserError(
                f"{self._classifier.backbone} cannot be exported to {self._format} "
                f"({first_line(error)})."
            ) from error
        finally:
            partial.unlink(missing_ok=True)
        return difference

    def _write(self, path: Path) -> None:
        network: nn.Module = self._classifier.network
        if self._preprocess:
            network = self._classifier
        if self._format in GRAPHS:
            network = self._with_last_steps(network)
        example = self._network_input(self._random_images(BATCH_SIZES[-1]))
        if self._format == "onnx":
            export_files.write_onnx(network, example, self.notes, path)
        elif self._format == "torch_export":
            export_files.write_torch_export(network, example, self.notes, path)
        elif self._format == "safetensors":
            export_files.write_safetensors(network, self.notes, path)
        else:
            export_files.write_state_dict(network, path)

    def _with_last_steps(self, network: nn.Module) -> nn.Module:
        """Return a network with what comes behind it in a graph: mirror image and temperature."""
        if self._mirrored:
            network = Mirrored(network)
        return Calibrated(network, self._classifier.temperature).eval()

    def _load(self, path: Path) -> Callable[[Tensor], Tensor] | None:
        """Return the network in the file as others will use it, or None without onnxruntime."""
        if self._format == "onnx":
            return export_files.load_onnx(path)
        if self._format == "torch_export":
            return torch.export.load(path).module()
        network = library_network(self._classifier.backbone, self._classifier.num_classes)
        network.load_state_dict(export_files.load_weights(path))
        return network.eval()

    @torch.inference_mode()
    def _try(self, path: Path) -> float | None:
        """Return the largest difference of a logit; raise `UserError` if it is too large."""
        network = self._load(path)
        if network is None:
            return None
        reference: nn.Module = self._classifier
        if self._format in GRAPHS:
            reference = self._with_last_steps(reference)
        expected_logits = []
        logits = []
        for batch_size in BATCH_SIZES:
            images = self._random_images(batch_size)
            expected_logits.append(reference(images))
            logits.append(network(self._network_input(images)))
        expected = torch.cat(expected_logits)
        difference = float((expected - torch.cat(logits)).abs().max())
        largest = float(expected.abs().max())
        is_close = difference <= TOLERANCE * max(1.0, largest)
        if not is_close:  # which NaN is not either
            raise UserError(
                "The exported network gives other logits than the checkpoint "
                f"(by {difference:.1e}, the largest being {largest:.1e}): nothing is kept."
            )
        return difference

    def _random_images(self, batch_size: int) -> Tensor:
        generator = torch.Generator().manual_seed(batch_size)
        return torch.rand(batch_size, 3, *self._geometry.size, generator=generator)

    def _network_input(self, images: Tensor) -> Tensor:
        """Return images as the exported network takes them."""
        if self._preprocess:
            return images
        mean = torch.tensor(self._geometry.mean).view(3, 1, 1)
        std = torch.tensor(self._geometry.std).view(3, 1, 1)
        return (resize(images, self._geometry.input_side) - mean) / std


def _check_format(name: str) -> None:
    if name in ENDINGS:
        return
    advice = f"the formats are {', '.join(ENDINGS)}."
    instead = INSTEAD.get(name.lower().strip("._"))
    if instead is not None:
        advice = f"take {instead}."
    raise UserError(f"--to {name} is no format here: {advice}")


def _require_onnx() -> None:
    missing = [package for package in ("onnx", "onnxscript") if find_spec(package) is None]
    if missing:
        raise UserError(f"ONNX needs {' and '.join(missing)}: pip install {' '.join(missing)}.")


def _check_path(path: Path, to: str, ckpt: Path) -> None:
    if path.suffix != ENDINGS[to] or path.resolve() == ckpt.resolve():
        raise UserError(
            f"{path} cannot be the file of {to}: "
            f"name another with --out, one that ends in {ENDINGS[to]}."
        )
    notes = path.with_suffix(".json")
    if to == "state_dict" and notes.exists() and not path.exists():
        raise UserError(f"{notes}, which goes with {path}, is there already: name another --out.")


def _require_library_network(classifier: ImageClassifier) -> None:
    """Refuse weights that do not fit the network that the library builds."""
    if classifier.changes:
        raise UserError(
            f"The library's {classifier.backbone} cannot take these weights, because this one was "
            f"adapted ({'; '.join(classifier.changes)}): export it --to onnx or torch_export."
        )


def library_network(backbone: str, num_classes: int) -> nn.Module:
    """Build a network as users of its library do: with the library's defaults.

    Only the auxiliary heads of GoogLeNet and Inception v3 are left out, which have no weights here.
    """
    if backbone == catalog.LENET:
        return lenet5(num_classes)
    if catalog.is_timm(backbone):
        name, _ = catalog.split(backbone)
        network: nn.Module = catalog.timm().create_model(name, num_classes=num_classes)
        return network
    if backbone in INCEPTION_NAMES:
        return models.get_model(
            backbone, num_classes=num_classes, aux_logits=False, init_weights=False
        )
    return models.get_model(backbone, num_classes=num_classes)


def library_geometry(classifier: ImageClassifier) -> Geometry:
    """Return the geometry of a classifier for the network that the library builds by default.

    GoogLeNet and Inception v3 are trained here with `transform_input`, as torchvision builds them
    for its own weights: they change the normalisation from ImageNet's statistics to 0.5. By default
    they do not, so mean and deviation take that over.
    """
    geometry = classifier.geometry
    if not getattr(classifier.network, "transform_input", False):
        return geometry
    means = []
    stds = []
    imagenet = zip(*STATISTICS["imagenet"], strict=True)
    own = zip(geometry.mean, geometry.std, strict=True)
    for (imagenet_mean, imagenet_std), (mean, std) in zip(imagenet, own, strict=True):
        # torchvision: x * (imagenet_std / 0.5) + (imagenet_mean - 0.5) / 0.5
        scale = imagenet_std / 0.5
        shift = (imagenet_mean - 0.5) / 0.5
        means.append(mean - shift * std / scale)
        stds.append(std / scale)
    return replace(geometry, mean=tuple(means), std=tuple(stds))
