"""Downloads from a server on this machine that misbehaves, and through proxies."""

import hashlib
import os
import random
import re
import resource
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pooch
import pytest
from broken_server import BrokenServer
from conftest import FORKS

from cifar_transfer.base import download
from cifar_transfer.base.download import fetch
from cifar_transfer.base.errors import UserError

DATA = random.Random(0).randbytes(150_000)
MD5 = "md5:" + hashlib.md5(DATA).hexdigest()
SHA256 = "sha256:" + hashlib.sha256(DATA).hexdigest()[:8]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[BrokenServer]:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    without_pause = SimpleNamespace(sleep=lambda seconds: None)
    monkeypatch.setattr(pooch.core, "time", without_pause)
    with BrokenServer({"/file": DATA}, slow_rate=200_000) as server:
        yield server


def get(
    server: BrokenServer,
    path: Path,
    *sources: str,
    digest: str = MD5,
    total_seconds: float = 60,
) -> Path:
    urls = [server.url(source) for source in sources]
    return fetch(urls, path, digest=digest, max_bytes=10_000_000, total_seconds=total_seconds)


def be_impatient(behaviour: str, monkeypatch: pytest.MonkeyPatch) -> float:
    """Return the total seconds for a download, and set those of silence: few where they will pass.

    A server that answers is not hurried: how soon it does depends on what else the machine does.
    """
    if behaviour in ("stall", "silent"):
        monkeypatch.setattr(download, "READ_SECONDS", 0.8)
    if behaviour.startswith("trickle"):
        return 2
    return 60


def names_in(folder: Path) -> list[str]:
    """Return the names in a folder, without the lock's, which stays."""
    return sorted(path.name for path in folder.iterdir() if path.name != ".x.bin.lock")


# What each misbehaviour is called in the error.
BROKEN = {
    "stall": r"silent for 0\.8 s",
    "silent": r"silent for 0\.8 s",
    "trickle_head": r"not finished after 2 s",
    "trickle": r"not finished after 2 s",
    "reset": r"broken off",
    "truncated": r"broken off",
    "truncated_unsaid": r"75\.0kB of wrong bytes: md5 [0-9a-f]{32}, expected [0-9a-f]{32}",
    "wrong": rf"150kB of wrong bytes: md5 [0-9a-f]{{32}}, expected {MD5[4:]}",
    "missing": r"HTTP status 404",
    "loop": r"endless redirects",
    "to_a_file": r"no http or https address",
    "bad_length": r"unusable answer, ValueError",
    "endless": r"more than 10\.0MB",
}
# requests follows 30 redirects; what took the total time is not tried again.
HITS = {"loop": 62, "trickle": 1, "trickle_head": 1}


@pytest.mark.parametrize("behaviour", BROKEN)
def test_a_broken_source_is_named_and_leaves_nothing(
    server: BrokenServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, behaviour: str
) -> None:
    total_seconds = be_impatient(behaviour, monkeypatch)
    message = rf"^could not download x\.bin: {server.host} \({BROKEN[behaviour]}\)$"
    with pytest.raises(UserError, match=message):
        get(server, tmp_path / "x.bin", f"/{behaviour}/file", total_seconds=total_seconds)
    assert server.hits[f"/{behaviour}/file"] == HITS.get(behaviour, 2)
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("behaviour", ["trickle", "stall", "wrong", "missing"])
def test_a_broken_source_is_left_for_the_next(
    server: BrokenServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, behaviour: str
) -> None:
    be_impatient(behaviour, monkeypatch)
    if behaviour == "trickle":
        monkeypatch.setattr(download, "SECONDS_BEFORE_NEXT", 0.5)
    path = get(server, tmp_path / "x.bin", f"/{behaviour}/file", "/file")
    assert path.read_bytes() == DATA
    assert server.hits["/file"] == 1
    assert names_in(tmp_path) == ["x.bin"]


@pytest.mark.parametrize(
    ("source", "hits"),
    [("/file", 1), ("/unsaid/file", 1), ("/overlong/file", 1), ("/once_500/file", 2)],
)
@pytest.mark.parametrize("digest", [MD5, SHA256, SHA256.upper()])
def test_a_whole_file_is_taken(
    server: BrokenServer, tmp_path: Path, source: str, hits: int, digest: str
) -> None:
    path = get(server, tmp_path / "new" / "folder" / "x.bin", source, digest=digest)
    assert path == tmp_path / "new" / "folder" / "x.bin"
    assert path.read_bytes() == DATA
    assert server.hits == {source: hits}
    assert names_in(path.parent) == ["x.bin"]


def test_a_file_has_the_rights_that_the_user_gives_to_new_files(
    server: BrokenServer, tmp_path: Path
) -> None:
    umask = os.umask(0o027)
    try:
        path = get(server, tmp_path / "x.bin", "/file")
    finally:
        os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_host_without_a_server_is_left(server: BrokenServer, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    address = f"http://user:secret@127.0.0.1:{port}/x"
    fetch([address, server.url("/file")], tmp_path / "x.bin", digest=MD5)
    message = rf"^could not download y: 127\.0\.0\.1:{port} \(no connection\)$"
    with pytest.raises(UserError, match=message):
        fetch([address], tmp_path / "y", digest=MD5)


def test_every_source_and_reason_is_told(server: BrokenServer, tmp_path: Path) -> None:
    wrong = hashlib.md5(bytes(byte ^ 1 for byte in DATA)).hexdigest()
    first = f"{server.host} (HTTP status 404)"
    second = f"{server.host} (150kB of wrong bytes: md5 {wrong}, expected {MD5[4:]})"
    message = re.escape(f"could not download x.bin: {first}; {second}")
    with pytest.raises(UserError, match=f"^{message}$"):
        get(server, tmp_path / "x.bin", "/missing/file", "/wrong/file")


def test_a_slow_source_is_waited_for(server: BrokenServer, tmp_path: Path) -> None:
    path = get(server, tmp_path / "x.bin", "/slow/file")
    assert path.read_bytes() == DATA
    assert server.hits == {"/slow/file": 1}


def test_an_existing_file_is_neither_read_nor_replaced(
    server: BrokenServer, tmp_path: Path
) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(b"mine")
    modified = path.stat().st_mtime_ns
    folder_modified = tmp_path.stat().st_mtime_ns
    get(server, path, "/file")
    assert path.stat().st_mtime_ns == modified
    # Not even a lock was made: the folder may be a read-only one.
    assert tmp_path.stat().st_mtime_ns == folder_modified
    assert not server.hits


def _fetch_with_stderr_in(file: Path, urls: list[str], path: Path) -> None:
    os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    fetch(urls, path, digest=SHA256)


@pytest.mark.slow
def test_of_four_processes_one_downloads(server: BrokenServer, tmp_path: Path) -> None:
    server.slow_rate = 40_000
    path = tmp_path / "there" / "x.bin"
    lines = tmp_path / "stderr"
    args = (lines, [server.url("/slow/file")], path)
    processes = [FORKS.Process(target=_fetch_with_stderr_in, args=args) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert server.hits == {"/slow/file": 1}
    assert path.read_bytes() == DATA
    assert names_in(path.parent) == ["x.bin"]
    assert lines.read_text().count("waiting for another process to download x.bin\n") == 3
    assert lines.read_text().count("downloaded x.bin: 150kB") == 1


def test_a_killed_download_leaves_nothing_under_the_name_and_the_next_succeeds(
    server: BrokenServer, tmp_path: Path
) -> None:
    path = tmp_path / "x.bin"
    args = ([server.url("/stall/file")], path)
    process = FORKS.Process(target=fetch, args=args, kwargs={"digest": MD5})
    process.start()
    deadline = time.monotonic() + 60
    while not any(part.stat().st_size for part in tmp_path.rglob("*") if part.is_file()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not path.exists()
    assert len(names_in(tmp_path)) == 1, "what it has left"
    assert get(server, path, "/file").read_bytes() == DATA
    assert names_in(tmp_path) == ["x.bin"]


def test_what_a_killed_download_has_left_goes_also_if_the_file_came_otherwise(
    server: BrokenServer, tmp_path: Path
) -> None:
    path = tmp_path / "x.bin"
    left = tmp_path / ".x.bin.partial"
    left.mkdir()
    (left / "tmp12345678").write_bytes(DATA[:100])
    (tmp_path / "tmp12345678").write_bytes(b"a file of the user")
    path.write_bytes(b"copied by hand")
    assert get(server, path, "/file").read_bytes() == b"copied by hand"
    assert names_in(tmp_path) == ["tmp12345678", "x.bin"]
    assert not server.hits


def test_a_mirror_that_trickles_is_left_soon_if_there_is_another(
    server: BrokenServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "SECONDS_BEFORE_NEXT", 0.5)
    urls = [server.url("/trickle/file"), server.url("/slow/file")]
    server.slow_rate = 100_000  # 1.5 s: the last one has all the time
    fetch(urls, tmp_path / "x.bin", digest=MD5, total_seconds=3600)
    assert server.hits == {"/trickle/file": 1, "/slow/file": 1}
    assert (tmp_path / "x.bin").read_bytes() == DATA


def test_after_a_failed_download_a_waiting_process_tries_itself(
    server: BrokenServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    be_impatient("stall", monkeypatch)

    def fail() -> None:
        with pytest.raises(UserError, match=r"could not download x\.bin"):
            get(server, tmp_path / "x.bin", "/stall/file")

    first = threading.Thread(target=fail)
    first.start()
    while not server.hits:
        time.sleep(0.01)
    get(server, tmp_path / "x.bin", "/file")
    first.join()
    assert server.hits == {"/stall/file": 2, "/file": 1}


def test_an_interrupt_leaves_nothing(server: BrokenServer, tmp_path: Path) -> None:
    def interrupt() -> None:
        while not any(part.stat().st_size for part in tmp_path.rglob("*") if part.is_file()):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    # Shells make background jobs ignore the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises(KeyboardInterrupt, match=r"^$"):
            get(server, tmp_path / "x.bin", "/stall/file")
    finally:
        signal.signal(signal.SIGINT, before)
    assert server.hits["/stall/file"] == 1, "neither read to its time-out nor tried again"
    assert names_in(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_named(server: BrokenServer, tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    folder = tmp_path / "taken" / "folder"
    with pytest.raises(UserError, match=f"^cannot write to {folder}: "):
        get(server, folder / "x.bin", "/file")
    assert not server.hits


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission_is_named(server: BrokenServer, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match=f"^cannot write to {tmp_path}: Permission denied"):
        get(server, tmp_path / "x.bin", "/file")
    assert not server.hits


@pytest.mark.parametrize("room", [50_000, len(DATA) - 1])
def test_a_full_disk_is_named_and_not_retried(
    server: BrokenServer, tmp_path: Path, room: int
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))  # writing fails as on a full disk
    try:
        with pytest.raises(UserError, match=f"^cannot write to {tmp_path}: "):
            get(server, tmp_path / "x.bin", "/file", "/unsaid/file")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert server.hits == {"/file": 1}
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("url", ["ftp://host/x", "file:///etc/passwd", "/etc/passwd", "https:///x"])
def test_other_addresses_are_refused(server: BrokenServer, tmp_path: Path, url: str) -> None:
    with pytest.raises(UserError, match=r"no http or https address|unusable answer, InvalidURL"):
        fetch([url], tmp_path / "x.bin", digest=MD5)
    assert names_in(tmp_path) == []


def test_without_a_terminal_lines_say_what_is_downloaded_and_how_far_it_is(
    server: BrokenServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    get(server, tmp_path / "x.bin", "/file")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"downloading x.bin from {server.host}", "downloaded x.bin: 150kB"]
    monkeypatch.setattr(download, "SECONDS_BETWEEN_LINES", 0)
    get(server, tmp_path / "y.bin", "/file")
    lines = capsys.readouterr().err.splitlines()
    assert "131kB so far" in lines


def test_a_terminal_shows_a_bar(
    server: BrokenServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(download, "SECONDS_BETWEEN_LINES", 0)
    get(server, tmp_path / "x.bin", "/slow/file")
    shown = capsys.readouterr().err
    assert "k/150k [" in shown
    assert "so far" not in shown


@pytest.fixture
def proxy(server: BrokenServer, monkeypatch: pytest.MonkeyPatch) -> BrokenServer:
    """Return the server as a proxy for all addresses, which are then what it is asked for."""
    for name in ("no_proxy", "NO_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", f"http://me:secret@{server.host}")
    server.files["http://mirror.test/file"] = DATA
    return server


def test_a_proxy_is_used_unless_the_environment_excepts_the_host(
    proxy: BrokenServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = fetch(["http://mirror.test/file"], tmp_path / "x.bin", digest=MD5)
    assert path.read_bytes() == DATA
    assert proxy.hits == {"http://mirror.test/file": 1}
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    assert get(proxy, tmp_path / "y.bin", "/file").read_bytes() == DATA
    assert proxy.hits["/file"] == 1


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "ALL_PROXY"])
@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("http://me:secret@127.0.0.1:9", "the proxy failed"),
        ("http://me:secret@SERVER", "HTTP status 407"),
        ("me:secret@127.0.0.1:9", "unusable answer, InvalidProxyURL"),
        ("http://me:secret@127.0.0.1:none", "unusable answer, InvalidURL"),
        ("no address", "unusable answer, InvalidURL"),
    ],
)
def test_a_proxy_that_does_not_serve_is_named_without_its_password(
    proxy: BrokenServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
    variable: str,
    value: str,
    reason: str,
) -> None:
    value = value.replace("SERVER", proxy.host)
    monkeypatch.delenv("HTTP_PROXY")
    monkeypatch.setenv(variable, value)
    address = value.rpartition("@")[2]
    message = rf"mirror\.test through the proxy '{address}' \({reason}\)"
    with pytest.raises(UserError, match=message) as raised:
        fetch(["http://mirror.test/refused"], tmp_path / "x.bin", digest=MD5)
    assert "secret" not in f"{raised.value}{capfd.readouterr()}"
