"""A trained network for other programs: `python -m cifar_transfer export --ckpt FILE --to onnx`.

Weights alone (`state_dict`, `safetensors`) are those of the library's own network. A graph (`onnx`, `torch_export`)
needs none of this project's code and takes any number of images at once. Each file is read back and must give the
logits of the checkpoint before it gets its name.
"""

import io
import json
import os
import secrets
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import auto_cli
from safetensors.torch import save
from torch import Tensor, nn

from cifar_transfer.base.errors import UserError, first_line
from cifar_transfer.base.files import write_json
from cifar_transfer.cli.parsers import Parser
from cifar_transfer.network import build
from cifar_transfer.network.image_classifier import ImageClassifier
from cifar_transfer.network.weights_file import read_weights
from cifar_transfer.training.checkpoint_file import load_classifier

Format = Literal["state_dict", "safetensors", "onnx", "torch_export"]
ENDINGS = {
    "state_dict": ".pth",
    "safetensors": ".safetensors",
    "onnx": ".onnx",
    "torch_export": ".pt2",
}
GRAPHS = ("onnx", "torch_export")
NOTES = "notes.json"  # a torch.export archive's file of what the other formats keep as metadata
BATCHES = (1, 2, 5)  # sizes that the file is tried with
TOLERANCE = (
    1e-4  # of the largest logit; float32 sums in another order differ by a hundredth of that
)


def export(ckpt: str, to: Format, out: str | None = None, preprocess: bool = True) -> float | None:
    """Write a checkpoint's network in another format, and read it back.

    Args:
        ckpt: The checkpoint.
        to: "state_dict" (the class names go beside it as JSON), "safetensors", "onnx", or "torch_export" for
            `torch.export.load`.
        out: The file; by default beside the checkpoint, under its name with .pth, .safetensors, .onnx or .pt2.
        preprocess: Put resizing and normalisation into the graph of onnx and torch_export, which then takes images as
            they are in [0, 1]; otherwise it takes what the network takes. Weights alone hold neither.

    Returns:
        The largest absolute difference of a logit between the file and the checkpoint, or None if there is no
        onnxruntime to run the file.

    Raises:
        UserError: An unfit checkpoint, a missing package, a network that the format cannot hold, or a file that does
            not give the checkpoint's logits, which is then removed.
    """
    missing = [package for package in ("onnx", "onnxscript") if find_spec(package) is None]
    if to == "onnx" and missing:
        raise UserError(f"ONNX needs {' and '.join(missing)}: pip install {' '.join(missing)}.")
    model = load_classifier(ckpt)
    path = Path(out) if out else Path(ckpt).with_suffix(ENDINGS[to])
    if path.suffix != ENDINGS[to] or path.resolve() == Path(ckpt).resolve():
        raise UserError(
            f"{path} cannot be the file of {to}: name another with --out, one that ends in {ENDINGS[to]}."
        )
    if to == "state_dict" and path.with_suffix(".json").exists() and not path.exists():
        raise UserError(
            f"{path.with_suffix('.json')}, which goes with {path}, is there already: name another --out."
        )
    if model.changes and to not in GRAPHS:
        raise UserError(
            f"The library's {model.backbone} cannot take these weights, because this one was adapted "
            f"({'; '.join(model.changes)}): export it --to onnx or torch_export."
        )
    inside = preprocess and to in GRAPHS
    images = [
        torch.rand(n, 3, *model.geometry.size, generator=torch.Generator().manual_seed(n))
        for n in BATCHES
    ]
    taken = (
        images if inside else [model.prepare(batch, model.geometry.input_side) for batch in images]
    )
    notes = _notes(model, taken[0], inside)
    partial = path.with_name(f"partial-{secrets.token_hex(8)}.{path.name}")
    print(f"Writing {path}, and trying it ...", file=sys.stderr)
    try:
        partial.touch()
        _write(to, model if inside else model.network, taken[-1], notes, partial)
        network = _read(to, model, partial)
        difference = _difference(model, images, network, taken) if network else None
        if to == "state_dict":
            write_json(path.with_suffix(".json"), notes)
        os.replace(partial, path)
    except UserError:
        raise
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}): name another file with --out."
        ) from None
    except Exception as error:  # of any kind, from tracing somebody's network
        raise UserError(
            f"{model.backbone} cannot be exported to {to} ({first_line(error)})."
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    print(f"file        {path} ({path.stat().st_size / 1e6:.1f} MB)")
    print(f"input       {notes['input']}")
    if difference is None:
        print("difference  not known: pip install onnxruntime")
    else:
        print(
            f"difference  {difference:.1e} at most in any logit of batches of {', '.join(map(str, BATCHES))}"
        )
    return difference


def _notes(model: ImageClassifier, taken: Tensor, inside: bool) -> dict[str, Any]:
    """What a program needs to know beside the network."""
    size = f"float32 [batch, 3, {taken.shape[2]}, {taken.shape[3]}], RGB in [0, 1]"
    return {
        "backbone": model.backbone,
        "class_names": model.class_names,
        "input": size if inside else f"{size}, then (x - mean) / std of each channel",
        "input_shape": ["batch", *taken.shape[1:]],
        "preprocess": inside,
        **model.geometry.describe(inside),
    }


def _write(
    to: Format, network: nn.Module, example: Tensor, notes: dict[str, Any], path: Path
) -> None:
    def text(note: object) -> str:
        return note if isinstance(note, str) else json.dumps(note, ensure_ascii=False)

    dynamic = ({0: torch.export.Dim("batch", min=1)},)
    texts = {key: text(note) for key, note in notes.items()}
    state = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    packed = (
        io.BytesIO()
    )  # because torch, when it writes a file itself, ends the process on a full disk
    if to == "state_dict":
        torch.save(state, packed)
        path.write_bytes(packed.getvalue())
    elif to == "safetensors":
        path.write_bytes(save(state, texts))  # `save_file` would let nobody else read it
    elif to == "torch_export":
        program = torch.export.export(network, (example,), dynamic_shapes=dynamic)
        with warnings.catch_warnings():
            # Of channels-last weights, which only other devices than the CPU might not get back.
            warnings.filterwarnings("ignore", "No complete tensor found")
            torch.export.save(program, packed, extra_files={NOTES: text(notes)})
        path.write_bytes(packed.getvalue())
    else:
        names: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"]}
        onnx = torch.onnx.export(
            network, (example,), dynamo=True, dynamic_shapes=dynamic, verbose=False, **names
        )
        assert onnx is not None
        onnx.model.metadata_props.update(texts)
        onnx.save(path, external_data=False)


def _read(to: Format, model: ImageClassifier, path: Path) -> Callable[[Tensor], Tensor] | None:
    """The file as others will use it; None without onnxruntime."""
    if to == "torch_export":
        return torch.export.load(path).module()
    if to == "onnx":
        if find_spec("onnxruntime") is None:
            return None
        from onnxruntime import InferenceSession

        session = InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return lambda images: torch.from_numpy(
            session.run(["logits"], {"images": images.numpy()})[0]
        )
    plain, _ = build.build_with_head(model.backbone, model.num_classes, initialise=False)
    plain.load_state_dict(read_weights(path)[0])
    return plain.eval()


@torch.inference_mode()
def _difference(
    model: nn.Module, images: list[Tensor], network: Callable[[Tensor], Tensor], taken: list[Tensor]
) -> float:
    """The largest absolute difference of a logit over batches of images and what `network` takes of them."""
    wanted, given = torch.cat([*map(model, images)]), torch.cat([*map(network, taken)])
    difference, largest = float((wanted - given).abs().max()), float(wanted.abs().max())
    if not difference <= TOLERANCE * max(1.0, largest):  # nor is NaN
        raise UserError(
            f"The exported network gives other logits than the checkpoint (by {difference:.1e}, the largest being "
            f"{largest:.1e}): nothing is kept."
        )
    return difference


def main(args: Sequence[str]) -> None:
    """Parse the options and export."""
    auto_cli(export, args=[*args], as_positional=False, parser_class=Parser)
