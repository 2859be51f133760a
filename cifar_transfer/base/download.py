"""Download a file with pooch from the first of several mirrors that delivers it whole.

pooch tries each mirror twice and draws the progress. Added here are digests of which only the
beginning is known (in the names of torchvision's files), a limit on the size, and a limit on the
total time: no time-out of requests ends a download that receives a byte now and then. A file is
downloaded into a hidden folder of its own, which the next download removes if this one is killed.
"""

import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import requests
from filelock import FileLock, Timeout
from tqdm import tqdm

from cifar_transfer.base.errors import UserError
from cifar_transfer.base.time_limit import within

with warnings.catch_warnings():
    # tqdm's bar for notebooks, which pooch imports and we do not use, asks for ipywidgets.
    warnings.filterwarnings("ignore", "IProgress not found")
    import pooch

CONNECT_SECONDS = 5.0  # to each network address of a host
READ_SECONDS = 20.0  # without a byte
SECONDS_BEFORE_NEXT = 300.0  # that a mirror has at most if another one is still to be tried
SECONDS_BETWEEN_LINES = 30.0  # of progress, where there is no terminal for a bar
REASONS = {
    requests.TooManyRedirects: "endless redirects",
    requests.exceptions.InvalidSchema: "no http or https address",
    requests.exceptions.MissingSchema: "no http or https address",
    requests.exceptions.SSLError: "no trusted TLS connection",
    requests.exceptions.ProxyError: "the proxy failed",
    requests.exceptions.ChunkedEncodingError: "broken off",
    requests.ConnectionError: "no connection",
}

pooch.get_logger().setLevel("WARNING")  # its lines on progress show the passwords of addresses


def fetch(
    urls: Sequence[str],
    path: Path,
    *,
    digest: str,
    max_bytes: int = 2**30,
    total_seconds: float = 1800.0,
) -> Path:
    """Download the first of `urls` that delivers into `path`, and return `path`.

    A file that exists already is not even read. Of several processes that want the same `path`,
    one downloads and the others wait. A mirror that is silent for `READ_SECONDS` is left for the
    next one. Proxies are those of the environment.

    Args:
        urls: http or https addresses of the same file, best first.
        path: Where the file belongs. Only the whole file ever gets this name.
        digest: `md5:` or `sha256:` and at least the first digits of the digest, hexadecimal.
        max_bytes: A mirror that sends more is left.
        total_seconds: A mirror that has not delivered after this time is left. All but the last
            have `SECONDS_BEFORE_NEXT` at most.

    Raises:
        UserError: No mirror delivers, or the folder cannot be written to. The text is a sentence
            without its full stop, so that the caller can add what to do.
    """
    download = partial(_download, digest=digest, max_bytes=max_bytes)
    folder = path.with_name(f".{path.name}.partial")
    try:
        if path.exists() and not _can_be_removed(folder):
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with _lock(path):
            shutil.rmtree(folder, ignore_errors=True)  # of a killed process
            try:
                if not path.exists():
                    _fetch_from_first(urls, path, folder, total_seconds, download)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise UserError(f"cannot write to {path.parent}: {reason}") from error
    return path


def _can_be_removed(folder: Path) -> bool:
    return folder.exists() and os.access(folder.parent, os.W_OK)


def through_proxy(url: str) -> str:
    """Return words for the environment's proxy for `url`, without its password, or ""."""
    proxies = requests.utils.get_environ_proxies(url, no_proxy=None)
    proxy = requests.utils.select_proxy(url, proxies)
    if not proxy:
        return ""
    return f" through the proxy {proxy.rpartition('@')[2]!r}"


def _fetch_from_first(
    urls: Sequence[str],
    path: Path,
    folder: Path,
    total_seconds: float,
    download: Callable[..., None],
) -> None:
    """Download into `folder` from one address after another, and move the whole file to `path`."""
    failures = []
    for number, url in enumerate(urls, 1):
        seconds = total_seconds
        if number < len(urls):
            seconds = min(seconds, SECONDS_BEFORE_NEXT)
        host = urlsplit(url).netloc.rpartition("@")[2] or url
        mirror = pooch.create(
            folder,
            base_url="",
            registry={path.name: None},  # the downloader compares the digest
            urls={path.name: url},
            retry_if_failed=1,
        )
        _say(f"downloading {path.name} from {host}")
        try:
            mirror.fetch(path.name, downloader=partial(download, total_seconds=seconds))
        except (requests.RequestException, TimeoutError, ValueError) as error:
            reason = _reason(error)
            _say(f"{host}: {reason}")
            failures.append(f"{host}{through_proxy(url)} ({reason})")
        else:
            os.replace(folder / path.name, path)
            _say(f"downloaded {path.name}: {_size(path.stat().st_size)}")
            return
    raise UserError(f"could not download {path.name}: {'; '.join(failures)}")


def _download(
    url: str,
    output_file: str,
    mirror: pooch.Pooch,
    *,
    digest: str,
    max_bytes: int,
    total_seconds: float,
) -> None:
    """Download as pooch asks for it, within a total time and up to a size, and compare the digest.

    Raises:
        TimeoutError: The total time is over.
        ValueError: The file is too large or has another digest, or the answer is unusable.
        requests.RequestException: The mirror does not deliver.
    """
    part = Path(output_file)
    part.unlink()  # pooch made it readable for its owner alone, also under its final name
    with (
        part.open("xb") as file,
        # tqdm counts as false without a total, and pooch would leave it undrawn.
        tqdm(total=max_bytes, unit="B", unit_scale=True, leave=False, disable=None) as bar,
    ):
        target = _LimitedFile(file, max_bytes)
        # A thread that is left behind ends at its next write, because the file is closed then.
        within(total_seconds, partial(_receive, url, target, mirror, bar))
    algorithm, _, expected = digest.lower().partition(":")
    actual = pooch.file_hash(output_file, algorithm)[: len(expected)]
    if actual != expected:
        raise _WrongContent(
            f"{_size(target.size)} of wrong bytes: {algorithm} {actual}, expected {expected}"
        )


def _receive(url: str, file: "_LimitedFile", mirror: pooch.Pooch, bar: tqdm) -> None:
    """Download with pooch, and close the connection, which pooch does not after an error."""
    with ExitStack() as connections:

        def close_at_the_end(response: requests.Response, **_: Any) -> None:
            connections.callback(response.close)

        downloader = pooch.HTTPDownloader(
            progressbar=bar,
            chunk_size=2**16,
            timeout=(CONNECT_SECONDS, READ_SECONDS),
            headers={"Accept-Encoding": "identity"},  # an archive must not be unpacked on the way
            hooks={"response": close_at_the_end},
        )
        downloader(url, file, mirror)


def _reason(error: Exception) -> str:
    """Return in a few words why a mirror did not deliver, without the address in the error."""
    if isinstance(error, TimeoutError | _WrongContent):
        return str(error)
    if isinstance(error, requests.HTTPError):
        return f"HTTP status {error.response.status_code}"
    if "Read timed out" in str(error):  # of several classes, in the head and in the body
        return f"silent for {READ_SECONDS:g} s"
    for kind, words in REASONS.items():
        if isinstance(error, kind):
            return words
    return f"unusable answer, {type(error).__name__}"


class _WrongContent(ValueError):
    """A mirror sends something else than the file."""


class _LimitedFile:
    """A file that takes `max_bytes` at most, and tells now and then how far the download is."""

    def __init__(self, file: BinaryIO, max_bytes: int) -> None:
        self.file = file
        self.max_bytes = max_bytes
        self.size = 0
        self.last_line = time.monotonic()
        self.flush = file.flush

    def write(self, chunk: bytes) -> None:
        self.size += len(chunk)
        if self.size > self.max_bytes:
            raise _WrongContent(f"more than {_size(self.max_bytes)}")
        self.file.write(chunk)
        is_due = time.monotonic() - self.last_line > SECONDS_BETWEEN_LINES
        if is_due and not sys.stderr.isatty():
            _say(f"{_size(self.size)} so far")
            self.last_line = time.monotonic()


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Keep other processes that want `path` waiting."""
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=2)
    except Timeout:
        _say(f"waiting for another process to download {path.name}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _size(count: int) -> str:
    return tqdm.format_sizeof(count, "B")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
