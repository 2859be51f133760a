"""Pretrained weights: found by name or file, verified, unwrapped from their publisher's format, loaded."""

import argparse
import difflib
import hashlib
import os
import pickle
import re
import sys
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision import models

from cifar_transfer.base.download import fetch, through_proxy, within
from cifar_transfer.base.errors import UserError, first_line
from cifar_transfer.base.untrusted import check_archive
from cifar_transfer.network import catalog

State = dict[str, Tensor]
OWN_PREFIX = "network."  # of the keys in our own checkpoints
# Under what publishers file the weights in their checkpoints: most; DeiT, BEiT and Swin; DINO.
WRAPPINGS = ("state_dict", "model", "teacher")
# Of all keys: DDP's; torch.compile's; MoCo v3's, v1's and v2's; DINO's; other people's Lightning modules'.
PREFIXES = (
    "module.",
    "_orig_mod.",
    "base_encoder.",
    "encoder_q.",
    "backbone.",
    "network.",
    "model.",
    "net.",
)
SHA256 = re.compile("[0-9a-f]{64}")
AUXILIARY = (
    "aux1.",
    "aux2.",
    "AuxLogits.",
)  # how the keys of auxiliary heads begin, GoogLeNet's and Inception v3's
LARGEST = 2**33  # bytes of a file whose size nobody says
HUB_SECONDS = 60.0  # for the Hub's answer to where a file is
THREE_WAYS_OUT = (
    "Three ways out: copy the file to {place}; name another with weights=FILE; or train without, "
    "weights=none (make demo needs no download)."
)


class Pretrained(NamedTuple):
    """What a source of weights holds."""

    state: State  # tensors by the network's own names
    saved: dict[
        str, Any
    ]  # the options of the run that wrote it, if it is a checkpoint of this project, else empty
    published: catalog.Weights | None  # the library's entry, if they were named


def _say(line: str) -> None:
    from lightning.pytorch.utilities import (
        rank_zero_info,
    )  # which prediction, that fetches nothing, need not wait for

    rank_zero_info(line)


def read(name: str, weights: str) -> Pretrained:
    """Weights of a network: "DEFAULT" or another of the library's names, a file (see `read_file`), or "none", no state.

    Raises:
        UserError: Nothing of that name, a file that is no weights, or a failed download.
    """
    known = catalog.weights(name)
    if weights.lower() == "none":
        return Pretrained({}, {}, None)
    if weights in known or (weights == "DEFAULT" and known):
        entry = known[weights] if weights in known else next(iter(known.values()))
        file = _from_hub(entry) if entry.hub else _fetch(entry.url, entry.mebibytes)
        return Pretrained(read_file(file)[0], {}, entry)
    path = Path(weights).expanduser()
    if path.is_file():
        return Pretrained(*read_file(path), None)
    if not known:
        raise UserError(
            f"No weights of {name} are published: train it from scratch with weights=none and "
            f"unfreeze_epoch=0, or name a file of your own with weights=FILE."
        )
    near = difflib.get_close_matches(weights, known, n=1)
    hint = f"Did you mean {near[0]}? " if near else ""
    raise UserError(
        f"weights={weights!r} is neither a file nor a name of {name}'s weights. {hint}"
        f"Take one of {', '.join(['DEFAULT', *known, 'none'])}, or a path."
    )


def _fetch(url: str, mebibytes: float | None = None) -> Path:
    """The library's file in torch's own cache, checked each time against the hash in its name, fetched when absent.

    torch checks the hash only while it downloads, so that a file cut short would fail for ever. The name has no more
    than the hash's first 32 bits, which tell damage but could be met on purpose; so the file is opened as any other.
    """
    path = Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[-1])
    match = re.search(r"-([0-9a-f]{8,})\.", path.name)
    if match is None:
        if path.is_file():
            return path
        raise UserError(
            f"{url} names no hash to verify it by, so it is not downloaded unasked: download it to {path} if you "
            f"trust it, or take other weights."
        )
    if path.is_file() and not (found := _sha256(path)).startswith(match[1]):
        _put_aside(path, path, match[1], found)
    try:
        most = int((mebibytes + 1) * 2**20) if mebibytes else LARGEST
        return fetch([url], path, digest=f"sha256:{match[1]}", max_bytes=most)
    except UserError as error:
        way_out = THREE_WAYS_OUT.format(place=path)
        raise UserError(
            f"The pretrained weights are not on this machine: {error}. {way_out}"
        ) from None


def _put_aside(file: Path, name: Path, wanted: str, found: str) -> None:
    """Make room for a download, and keep what is there: it may be damaged, or somebody's other weights."""
    aside = file.with_name(f"{file.name}.other-{found[:8]}")
    os.replace(file, aside)
    _say(
        f"{name} is not the published file (SHA-256 {found[: len(wanted)]}, expected {wanted}): it is kept as "
        f"{aside.name}, and the published one is downloaded."
    )


def _from_hub(entry: catalog.Weights) -> Path:
    """timm's file in the Hugging Face cache, checked each time: its blob is named by its SHA-256 there."""
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    assert entry.hub is not None
    repository, *names = *entry.hub, "pytorch_model.bin"  # timm's repositories have this too
    for name in names:
        with suppress(LocalEntryNotFoundError):
            path = Path(hf_hub_download(repository, name, local_files_only=True))
            blob = (
                path.resolve()
            )  # not named by a SHA-256 if it was copied there by hand: nothing to compare with
            if not SHA256.fullmatch(blob.name) or (found := _sha256(blob)) == blob.name:
                return path
            _put_aside(blob, path, blob.name, found)
            path.unlink(missing_ok=True)  # the Hub's link to it
    _say(f"Fetching the weights {repository} from {constants.ENDPOINT} ...")
    try:
        try:
            return _into_hubs_cache(repository, names[0])
        except EntryNotFoundError:
            return _into_hubs_cache(repository, names[1])
    except (
        Exception
    ) as error:  # of any kind: the Hub's own, and those of its HTTP library of the day
        way_out = THREE_WAYS_OUT.format(place=f"the Hugging Face cache, {constants.HF_HUB_CACHE}")
        why = f"{first_line(error)}{through_proxy(constants.ENDPOINT)}"
        raise UserError(
            f"The weights {repository} could not be fetched ({why}). {way_out}"
        ) from None


def _into_hubs_cache(repository: str, name: str) -> Path:
    """The Hub's own download waits for ever for a server that sends a byte now and then, or without end."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.file_download import repo_folder_name

    found = within(HUB_SECONDS, partial(get_hf_file_metadata, hf_hub_url(repository, name)))
    if not SHA256.fullmatch(found.etag or ""):
        raise UserError(f"{name} of {repository} comes without a SHA-256 to verify it by")
    folder = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repository, repo_type="model"))
    blob = folder / "blobs" / str(found.etag)
    fetch([found.location], blob, digest=f"sha256:{found.etag}", max_bytes=found.size or LARGEST)
    link = within(HUB_SECONDS, partial(hf_hub_download, repository, name))  # which finds the blob
    return Path(link)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_file(path: Path) -> tuple[State, dict[str, Any]]:
    """Read a file of weights without running any code that it may hold.

    Args:
        path: A state dict (`.safetensors`, or as `torch.save` writes it) of torchvision or timm; a published checkpoint
            that wraps one (MoCo v1 to v3, DeiT, BEiT, Swin, DINO); or a Lightning checkpoint, ours or another's.

    Returns:
        The tensors by the network's own names, and the options of the run if it is a checkpoint of ours.

    Raises:
        UserError: The file is damaged, holds objects other than tensors and primitives, or no state dict.
    """
    check_archive(path)
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            with torch.serialization.safe_globals(
                [argparse.Namespace]
            ):  # many publishers file their options beside
                content = torch.load(path, "cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} is not opened: it holds more than tensors, or is no file of weights."
        ) from None
    except Exception as error:  # of any kind: the file may come from anywhere
        raise UserError(
            f"{path} cannot be read as weights ({first_line(error)}): it may be cut short."
        ) from None
    saved: dict[str, Any] = {}
    options = content.get("hyper_parameters") if isinstance(content, dict) else None
    if (
        isinstance(options, dict)
        and "backbone" in options
        and isinstance(content.get("state_dict"), Mapping)
    ):
        saved = {**options, "input_size": content.get("input_size")}
        tensors = content["state_dict"].items()
        content = {
            key.removeprefix(OWN_PREFIX): value
            for key, value in tensors
            if key.startswith(OWN_PREFIX)
        }
    else:
        for key in WRAPPINGS:
            if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
                content = content[key]
    if (
        not isinstance(content, Mapping)
        or not content
        or not all(isinstance(v, Tensor) for v in content.values())
    ):
        raise UserError(
            f"{path} is no state dict: save one with torch.save(network.state_dict(), FILE)."
        )
    return dict(content) if saved else _renamed(content), saved


def _renamed(state: Mapping[str, Tensor]) -> State:
    """Without the prefixes of wrappers; of several encoders the one that others continue from."""
    named, stripped = dict(state), True
    while stripped:
        stripped = False
        for prefix in PREFIXES:
            inner = {
                key.removeprefix(prefix): value
                for key, value in named.items()
                if key.startswith(prefix)
            }
            if inner:
                named, stripped = inner, True
    # As torchvision's own builder does for its files of DenseNet.
    old = re.compile(
        r"^(.*denselayer\d+\.(?:norm|relu|conv))\.((?:[12])\.(?:weight|bias|running_mean|running_var))$"
    )
    return {old.sub(r"\1\2", key): value for key, value in named.items()}


def load(
    network: nn.Module, state: State, heads: Sequence[str], source: str, unwanted: str = ""
) -> None:
    """Put weights into a network; a head for other classes is dropped, and every other tensor must arrive.

    Args:
        network: As the weights have it, but for the outputs of its heads.
        state: Tensors by its names, or in a format that timm converts from.
        heads: Names of the layers that tell classes apart.
        source: What messages call the weights.
        unwanted: Why the head is not wanted even when it fits; empty if it is.

    Raises:
        UserError: Tensors are missing, unknown or of another shape.
    """
    expected = network.state_dict()
    state = _in_the_networks_format(network, state, expected)
    for head in heads:
        own = {key for key in expected if key.startswith(f"{head}.")}
        given = {key for key in state if key.startswith(f"{head}.")}
        fits = own == given and all(state[key].shape == expected[key].shape for key in own)
        if given and (unwanted or not fits):
            weight = f"{head}.weight"
            outputs = (
                f"it has {len(state[weight])} outputs, the data"
                if weight in given
                else "the data have"
            )
            why = unwanted or f"{outputs} {len(expected[weight])} classes."
            _say(f"The pretrained head is dropped: {why}")
            state = {key: value for key, value in state.items() if key not in given}
    other = {
        key for key in state.keys() & expected.keys() if state[key].shape != expected[key].shape
    }
    usable = OrderedDict((key, value) for key, value in state.items() if key not in other)
    # Without versions of its modules a state dict counts as oldest, so that torch and torchvision look for old names.
    if isinstance(network, models.MNASNet):  # which insists on a version
        usable._metadata = expected._metadata  # type: ignore[attr-defined]
    bad = {
        key
        for key, value in usable.items()
        if value.is_floating_point() and not value.isfinite().all()
    }
    if bad:  # torchvision says of VGG16's IMAGENET1K_FEATURES that values are missing
        raise UserError(
            f"The weights {source} hold values that are no numbers, in {_some(bad)}: take others."
        )
    result = network.load_state_dict(usable, strict=False)
    needless = tuple(f"{head}." for head in heads)
    wrong = {
        "missing": {key for key in result.missing_keys if not key.startswith(needless)} - other,
        "unknown": {key for key in result.unexpected_keys if not key.startswith(AUXILIARY)},
        "of another shape": other,
    }
    if any(wrong.values()):
        found = "; ".join(f"{what}: {_some(keys)}" for what, keys in wrong.items() if keys)
        raise UserError(f"The weights {source} do not fit the network. Keys {found}.")


def _in_the_networks_format(
    network: nn.Module, state: State, expected: Mapping[str, Tensor]
) -> State:
    """Converted by timm, which keeps a function beside each network for the formats of its publishers."""
    module = type(network).__module__
    convert = (
        getattr(sys.modules[module], "checkpoint_filter_fn", None)
        if module.startswith("timm.")
        else None
    )
    same = {key: value.shape for key, value in state.items()} == {
        key: value.shape for key, value in expected.items()
    }
    if convert and not same:
        with suppress(
            Exception
        ):  # of any kind: not a format that it knows, and what does not fit will be named
            return dict(convert(dict(state), network))
    return state


def _some(keys: Iterable[str], most: int = 5) -> str:
    keys = sorted(keys)
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")
