"""Files of networks for other programs, in four formats: written, and loaded as others do."""

import io
import json
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

NOTES = "notes.json"  # in an archive of torch.export: what the other formats have as metadata


def write_state_dict(network: nn.Module, path: Path) -> None:
    """Write the weights of a network for `torch.load`."""
    # If torch writes a file itself, a full disk ends the process.
    buffer = io.BytesIO()
    torch.save(_contiguous_state(network), buffer)
    path.write_bytes(buffer.getvalue())


def write_safetensors(network: nn.Module, notes: dict[str, Any], path: Path) -> None:
    """Write the weights of a network for safetensors, with notes as metadata."""
    # `save_file` would make a file that nobody else may read.
    path.write_bytes(save(_contiguous_state(network), _as_texts(notes)))


def load_weights(path: Path) -> dict[str, Tensor]:
    """Load the file of `write_safetensors` or `write_state_dict`."""
    if path.suffix == ".safetensors":
        return load_file(path)
    weights: dict[str, Tensor] = torch.load(path, weights_only=True)
    return weights


def write_torch_export(
    network: nn.Module, example: Tensor, notes: dict[str, Any], path: Path
) -> None:
    """Write the graph of a network for `torch.export.load`, with notes as an extra file."""
    program = torch.export.export(network, (example,), dynamic_shapes=_any_batch_size())
    extra_files = {NOTES: json.dumps(notes, ensure_ascii=False)}
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # Of channels-last weights, which only other devices than the CPU might not get back.
        warnings.filterwarnings("ignore", "No complete tensor found")
        torch.export.save(program, buffer, extra_files=extra_files)
    path.write_bytes(buffer.getvalue())


def write_onnx(network: nn.Module, example: Tensor, notes: dict[str, Any], path: Path) -> None:
    """Write the graph of a network for ONNX, with notes as metadata."""
    program = torch.onnx.export(
        network,
        (example,),
        dynamo=True,
        dynamic_shapes=_any_batch_size(),
        verbose=False,
        input_names=["images"],
        output_names=["logits"],
    )
    assert program is not None
    program.model.metadata_props.update(_as_texts(notes))
    program.save(path, external_data=False)


def load_onnx(path: Path) -> Callable[[Tensor], Tensor] | None:
    """Return the graph of an ONNX file as a function, or None without onnxruntime."""
    if find_spec("onnxruntime") is None:
        return None
    from onnxruntime import InferenceSession

    session = InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])

    return run


def _contiguous_state(network: nn.Module) -> dict[str, Tensor]:
    state = network.state_dict()  # with metadata, without which MNASNet takes no weights
    for name, tensor in state.items():
        state[name] = tensor.contiguous()
    return state


def _any_batch_size() -> tuple[dict[int, Any]]:
    return ({0: torch.export.Dim("batch", min=1)},)


def _as_texts(notes: dict[str, Any]) -> dict[str, str]:
    """Return notes as texts. What is no text becomes JSON."""
    texts = {}
    for key, note in notes.items():
        texts[key] = note if isinstance(note, str) else json.dumps(note, ensure_ascii=False)
    return texts
