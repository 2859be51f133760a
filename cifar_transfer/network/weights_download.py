"""Files of published weights in the caches of torch and of the Hugging Face Hub.

Each file is compared with its hash whenever it is used: torch and the Hub do that at most while
they download, so that a damaged file would fail for ever, or be used without a word.
"""

import hashlib
import os
import re
from functools import partial
from pathlib import Path

import torch

from cifar_transfer.base.console import inform
from cifar_transfer.base.download import fetch, through_proxy
from cifar_transfer.base.errors import UserError, first_line
from cifar_transfer.base.time_limit import within
from cifar_transfer.network import catalog

DOWNLOAD_SECONDS = 3600.0  # for the largest file, of 2.4 GB, 700 kB a second
MAX_BYTES = 2**33  # of a file whose size the library does not say
HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,})\.")  # of torchvision's files: the first digits
SHA256 = re.compile(r"[0-9a-f]{64}")  # name of a large file in the Hub's cache
SECOND_HUB_FILE = "pytorch_model.bin"  # timm's repositories have it too, some have it alone
THREE_WAYS_OUT = (
    "Three ways out: copy the file to {place}; name another with weights=FILE; or train without, "
    "weights=none (make demo needs no download)."
)


def published_file(entry: catalog.Weights) -> Path:
    """Return the file of published weights, downloaded when it is not in its library's cache.

    Raises:
        UserError: The file cannot be downloaded.
    """
    if entry.hub is not None:
        return _hub_file(*entry.hub)
    return _torchvision_file(entry.url, entry.mebibytes)


def _torchvision_file(url: str, mebibytes: float | None) -> Path:
    """Return torchvision's file in torch's cache, verified by the hash in its name.

    The name has no more than the first 32 bits of the hash, which tell damage but could be met on
    purpose. The file is therefore opened like any other.
    """
    path = Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[-1])
    match = HASH_IN_NAME.search(path.name)
    if match is None:
        if path.is_file():
            return path
        raise UserError(
            f"{url} names no hash to verify it by, so it is not downloaded: download it to {path} "
            f"if you trust it, or take other weights."
        )
    if path.is_file():
        actual = _sha256(path)
        if actual.startswith(match[1]):
            return path
        _put_aside(path, expected=match[1], actual=actual)
    max_bytes = MAX_BYTES
    if mebibytes is not None:
        max_bytes = int((mebibytes + 1) * 2**20)
    digest = f"sha256:{match[1]}"
    try:
        return fetch(
            [url], path, digest=digest, max_bytes=max_bytes, total_seconds=DOWNLOAD_SECONDS
        )
    except UserError as error:
        ways_out = THREE_WAYS_OUT.format(place=path)
        raise UserError(
            f"The pretrained weights are not on this machine: {error}. {ways_out}"
        ) from None


def _hub_file(repository: str, file_name: str) -> Path:
    """Return timm's file in the Hugging Face cache, verified by the SHA-256 that names it there."""
    from huggingface_hub import constants, try_to_load_from_cache

    for name in (file_name, SECOND_HUB_FILE):
        cached = try_to_load_from_cache(repository, name)
        if isinstance(cached, str) and _is_whole(Path(cached)):
            return Path(cached)
    inform(f"Fetching the weights {repository} from {constants.ENDPOINT} ...")
    try:
        # The Hub's own download waits for ever for a server that sends a byte now and then.
        path = within(DOWNLOAD_SECONDS, partial(_download_from_hub, repository, file_name))
        if not _is_whole(path):
            raise UserError("other bytes arrived than the Hub announced")
    except Exception as error:  # of any kind: the Hub's own, and its HTTP library's
        reason = f"{first_line(error)}{through_proxy(constants.ENDPOINT)}"
        ways_out = THREE_WAYS_OUT.format(place=f"the Hugging Face cache, {constants.HF_HUB_CACHE}")
        raise UserError(
            f"The weights {repository} could not be fetched ({reason}). {ways_out}"
        ) from None
    return path


def _download_from_hub(repository: str, file_name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repository, file_name))
    except LocalEntryNotFoundError:  # the Hub gave no answer
        raise
    except EntryNotFoundError:
        return Path(hf_hub_download(repository, SECOND_HUB_FILE))


def _is_whole(path: Path) -> bool:
    """Return whether a file in the Hub's cache has the hash that names it; if not, put it aside."""
    # The file is a link to blobs/SHA256, which may be a link itself, to a name of another kind.
    blob = Path(os.readlink(path) if path.is_symlink() else path)
    if not SHA256.fullmatch(blob.name):  # copied there by hand: nothing to compare with
        return True
    actual = _sha256(path)
    if actual == blob.name:
        return True
    _put_aside(path.resolve(), expected=blob.name, actual=actual)
    path.unlink()
    return False


def _put_aside(path: Path, *, expected: str, actual: str) -> None:
    """Rename a file that may be damaged, or somebody's other weights."""
    aside = path.with_name(f"{path.name}.other-{actual[:8]}")
    os.replace(path, aside)
    inform(
        f"{path} is not the published file (SHA-256 {actual[: len(expected)]}, expected "
        f"{expected}): it is kept as {aside.name}."
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
