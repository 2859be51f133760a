"""Download a file from the first of several sources that delivers it whole.

A source may be gone, wrong, silent or far too slow (the host of CIFAR-10 has been: pytorch/vision issue 9536), so each
is watched and left for the next one. Only bytes with the right digest ever get the final name.
"""

import hashlib
import os
import platform
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar
from urllib.parse import urlsplit

import requests
from filelock import FileLock, Timeout
from tqdm import tqdm

from cifar_transfer.base.errors import UserError
from cifar_transfer.base.files import sync
from cifar_transfer.base.text import without_password

Result = TypeVar("Result")

CHUNK_BYTES = (
    16 * 1024
)  # arriving bytes are counted in whole chunks; fewer than one within `stall_seconds` is silence
TICKS = 40  # how many times the watch looks within `stall_seconds`
PAUSE_SECONDS = 0.5  # before a source is asked again


class _Wanted(NamedTuple):
    path: Path
    digest: str
    stall_seconds: float
    max_bytes: int


class _SourceFailed(Exception):
    """Why a source did not deliver, in a few words."""


class _TooSlow(_SourceFailed):
    """Which is better than none."""


def fetch(
    urls: Sequence[str],
    path: Path,
    *,
    digest: str,
    stall_seconds: float = 20.0,
    attempts: int = 2,
    min_bytes_per_second: float = 100_000,
    max_bytes: int = 2**30,
) -> Path:
    """Download the first of `urls` that delivers into `path`, and return `path`; an existing file is not even read.

    Of several processes that want the same `path`, one downloads and the others wait. A source that is too slow is left
    for the others; when these have failed, it is asked again without a lower limit, because a slow download is better
    than none. Progress is shown on stderr. Proxies are taken from the environment.

    Args:
        urls: http or https, best first.
        digest: `md5:` or `sha256:` and the first hexadecimal digits of the file's digest, 8 or more.
        stall_seconds: a source that sends nothing for this long is left; the rate is measured over the same time, and a
            connection to one network address may take a quarter of it. Over 0.
        attempts: at each source before the next one, from 1.
        min_bytes_per_second: a source with a lower mean rate is left while others remain. The default would take half
            an hour for the 170 MB of CIFAR-10.
        max_bytes: a source that sends more is left.

    Raises:
        UserError: no source delivered, the folder cannot be written to, or an address is not http or https. The text
            is a sentence without its full stop, to which the caller can add the ways out.
        ValueError: `digest` is not of the form above.
    """
    if not re.fullmatch(r"(md5|sha256):[0-9a-f]{8,}", digest.lower()):
        raise ValueError(
            f"digest must be md5: or sha256: and at least 8 hexadecimal digits, not {digest!r}"
        )
    for url in urls:
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
            raise UserError(
                f"cannot download {path.name} from {without_password(url)!r}: not an http or https address"
            )
    with _writing_to(path.parent):
        if path.exists():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with _only_process(path):
            if not path.exists():
                wanted = _Wanted(path, digest.lower(), stall_seconds, max_bytes)
                _from_any(urls, wanted, attempts, min_bytes_per_second)
    return path


def within(seconds: float, call: Callable[[], Result]) -> Result:
    """The result of a call that may never end, such as one to a server that sends a byte now and then.

    Raises:
        TimeoutError: it has not ended by then, and is left alone. Its own errors are raised as they are.
    """
    started = _started(call)
    if wait([started], seconds).not_done:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return started.result()


def _started(call: Callable[[], Result]) -> Future[Result]:
    """A call on a thread that can be left behind: unlike an executor's, it does not keep the program from ending."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _from_any(
    urls: Sequence[str], wanted: _Wanted, attempts: int, min_bytes_per_second: float
) -> None:
    failures: dict[str, list[str]] = {}
    pending = deque(dict.fromkeys(urls))
    while pending:
        url = pending.popleft()
        # The last source left, and one taken up again, may be slow: nothing better is to be had.
        slowest = min_bytes_per_second if pending and url not in failures else 0
        for attempt in range(attempts):
            time.sleep(PAUSE_SECONDS if attempt else 0)
            try:
                return _Attempt(url, wanted).run(slowest)
            except _SourceFailed as failure:
                _say(f"{_host(url)}: {failure}")
                failures.setdefault(url, []).append(str(failure))
                if isinstance(failure, _TooSlow):
                    pending.append(url)
                    break
    tried = "; ".join(
        f"{_host(url)}{through_proxy(url)} ({', then '.join(dict.fromkeys(why))})"
        for url, why in failures.items()
    )
    raise UserError(f"could not download {wanted.path.name}: {tried or 'no source is known'}")


class _Attempt:
    """One attempt at one source: a thread receives and counts, and is watched."""

    def __init__(self, url: str, wanted: _Wanted) -> None:
        self.url, self.wanted = url, wanted
        algorithm, _, self.prefix = wanted.digest.partition(":")
        self.hasher = hashlib.new(algorithm, usedforsecurity=False)
        self.received = self.total = 0  # bytes; in all, as the source says, 0 where it does not

    def run(self, slowest: float) -> None:
        """Download; leave a source that gives fewer bytes per second than `slowest`."""
        path, start = self.wanted.path, time.monotonic()
        # A fixed name, so that the rest of a killed process is overwritten; one for each host, because a lock may not
        # reach across a network file system.
        part = path.with_name(f".{path.name}.{platform.node()}.part")
        try:
            with part.open("wb") as file:
                self._watch(_started(lambda: self._receive(file)), slowest)
                if not (found := self.hasher.hexdigest()).startswith(self.prefix):
                    sums = f"{self.hasher.name} {found[: len(self.prefix)]}, expected {self.prefix}"
                    raise _SourceFailed(f"{_size(self.received)} of wrong bytes: {sums}")
                sync(file)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
        _say(f"downloaded {path.name}: {_size(self.received)} in {time.monotonic() - start:.0f} s")

    def _receive(self, file: BinaryIO) -> None:
        """A thread of its own, because no time-out ends a name look-up, or a socket that receives a byte now and then.

        One that is left behind ends at its next write, because the file is closed by then.
        """
        # Short for the connection, so that an address that does not answer leaves time for the host's others; long for
        # the rest, so that it is the watch that speaks first.
        timeout = (self.wanted.stall_seconds / 4, self.wanted.stall_seconds * 2)
        headers = {"Accept-Encoding": "identity"}  # an archive must not be unpacked on the way
        try:
            with requests.get(self.url, stream=True, timeout=timeout, headers=headers) as response:
                response.raise_for_status()
                self.total = int(response.headers.get("Content-Length", 0))
                for chunk in response.iter_content(CHUNK_BYTES):
                    if max(self.total, self.received + len(chunk)) > self.wanted.max_bytes:
                        raise _SourceFailed(f"more than {_size(self.wanted.max_bytes)}")
                    with _writing_to(self.wanted.path.parent):
                        file.write(chunk)
                    self.hasher.update(chunk)
                    self.received += len(chunk)
        except (UserError, _SourceFailed):
            raise
        except (
            Exception
        ) as error:  # a broken source can raise anything, from a bad header to a bad certificate
            raise _SourceFailed(_in_words(error, self.received)) from error

    def _watch(self, receiving: Future[None], slowest: float) -> None:
        """Wait until all has arrived, and raise `_SourceFailed` when the source fails or comes to a stall."""
        what, stall_seconds = (
            f"{self.wanted.path.name} from {_host(self.url)}",
            self.wanted.stall_seconds,
        )
        # Counted in ticks, not by the clock: a program that was suspended has not seen a stall.
        history = deque([0], maxlen=TICKS + 1)
        with tqdm(
            desc=what, unit="B", unit_scale=True, leave=False, disable=None
        ) as bar:  # on a terminal
            finished = False
            while not finished:
                finished = bool(wait([receiving], stall_seconds / TICKS).done)
                if self.received and not history[-1]:
                    bar.total = self.total or None
                    if bar.disable:
                        _say(
                            f"downloading {what} ({_size(self.total) if self.total else 'unknown size'})"
                        )
                history.append(self.received)
                bar.update(history[-1] - bar.n)
                recent = history[-1] - history[0]
                if not finished and len(history) > TICKS and recent <= slowest * stall_seconds:
                    silent = _SourceFailed(f"silent for {stall_seconds:g} s")
                    raise _TooSlow(f"only {_size(recent / stall_seconds)}/s") if recent else silent
        receiving.result()


def _in_words(error: Exception, received: int) -> str:
    match error:
        case requests.HTTPError(response=requests.Response(status_code=status)):
            return f"HTTP status {status}"
        case requests.TooManyRedirects():
            return "endless redirects"
        case requests.exceptions.SSLError():
            return "no trusted TLS connection"
        case requests.exceptions.ProxyError():
            return "the proxy failed"
        case requests.ConnectionError() if not received:
            return "no connection"
        case requests.ConnectionError() | requests.exceptions.ChunkedEncodingError():
            return f"broken off after {_size(received)}"
    return f"unusable answer, {type(error).__name__}"


@contextmanager
def _only_process(path: Path) -> Iterator[None]:
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
        if (
            path.exists()
        ):  # else another process might lock a new file while one still waits for this
            with suppress(OSError):
                Path(lock.lock_file).unlink()
        lock.release()


@contextmanager
def _writing_to(folder: Path) -> Iterator[None]:
    """Turn an error of the file system into a `UserError` that names `folder`."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise UserError(f"cannot write to {folder}: {reason}") from error


def through_proxy(url: str) -> str:
    """Words for the proxy by which the environment has an address asked, without its password; empty if none."""
    proxy = requests.utils.select_proxy(url, requests.utils.get_environ_proxies(url, no_proxy=None))
    return f" through the proxy {proxy.rpartition('@')[2]!r}" if proxy else ""


def _host(url: str) -> str:
    """Host and port, without user name and password."""
    return urlsplit(url).netloc.rpartition("@")[2]


def _size(count: float) -> str:
    return tqdm.format_sizeof(count, "B")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
