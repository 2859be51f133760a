import hashlib
import os
import random
import re
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import FORKS

from cifar_transfer.base.download import fetch
from cifar_transfer.base.errors import UserError

sys.path.insert(0, str(Path(__file__).parent))
from broken_server import BrokenServer

DATA = random.Random(0).randbytes(150_000)
MD5 = "md5:" + hashlib.md5(DATA).hexdigest()
SHA256 = "sha256:" + hashlib.sha256(DATA).hexdigest()[:8]
STALL = 0.8  # seconds


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[BrokenServer]:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setattr("cifar_transfer.base.download.PAUSE_SECONDS", 0.01)
    with BrokenServer({"/file": DATA}, slow_rate=60_000) as server:
        yield server


def get(server: BrokenServer, path: Path, *sources: str, **settings: object) -> Path:
    options: dict = {"digest": MD5, "stall_seconds": STALL, "max_bytes": 10_000_000} | settings
    return fetch([server.url(source) for source in sources], path, **options)


def left(folder: Path) -> list[str]:
    """What lies in `folder`, less the empty lock file that a failure leaves."""
    return sorted(
        entry.name
        for entry in folder.iterdir()
        if entry.name != ".x.bin.lock" or entry.stat().st_size
    )


# What each misbehaviour is called in the error, and how many seconds the two attempts may take on a busy machine.
BROKEN = {
    "stall": (rf"silent for {STALL:g} s", 10),
    "silent": (rf"silent for {STALL:g} s", 10),
    "trickle_head": (rf"silent for {STALL:g} s", 10),
    "trickle": (rf"silent for {STALL:g} s", 10),
    "reset": (r"broken off after [\d.]+k?B", 5),
    "truncated": (r"broken off after [\d.]+kB", 5),
    "truncated_unsaid": (r"75\.0kB of wrong bytes: md5 [0-9a-f]{32}, expected [0-9a-f]{32}", 5),
    "wrong": (rf"150kB of wrong bytes: md5 [0-9a-f]{{32}}, expected {MD5[4:]}", 5),
    "missing": (r"HTTP status 404", 5),
    "loop": (r"endless redirects", 10),
    "to_a_file": (r"unusable answer, InvalidSchema", 5),
    "bad_length": (r"unusable answer, ValueError", 5),
    "endless": (r"more than 10\.0MB", 10),
}


@pytest.mark.parametrize("behaviour", BROKEN)
def test_a_broken_source_is_tried_twice_and_then_named(
    server: BrokenServer, tmp_path: Path, behaviour: str
) -> None:
    words, seconds = BROKEN[behaviour]
    start = time.monotonic()
    with pytest.raises(UserError, match=rf"^could not download x\.bin: {server.host} \({words}\)$"):
        get(server, tmp_path / "x.bin", f"/{behaviour}/file")
    assert time.monotonic() - start < seconds
    assert server.hits[f"/{behaviour}/file"] == (
        62 if behaviour == "loop" else 2
    )  # requests follows 30 redirects
    assert left(tmp_path) == []


@pytest.mark.parametrize("behaviour", BROKEN)
def test_a_broken_source_is_left_for_the_next(
    server: BrokenServer, tmp_path: Path, behaviour: str
) -> None:
    start = time.monotonic()
    path = get(server, tmp_path / "x.bin", f"/{behaviour}/file", "/file", attempts=1)
    assert path.read_bytes() == DATA
    assert time.monotonic() - start < BROKEN[behaviour][1]
    assert server.hits["/file"] == 1
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["x.bin"]


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
    assert os.listdir(path.parent) == ["x.bin"]


def test_a_host_without_a_server_is_left(server: BrokenServer, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    fetch(
        [f"http://user:secret@127.0.0.1:{port}/x", server.url("/file")],
        tmp_path / "x.bin",
        digest=MD5,
    )
    with pytest.raises(
        UserError, match=rf"^could not download y: 127\.0\.0\.1:{port} \(no connection\)$"
    ):
        fetch([f"http://user:secret@127.0.0.1:{port}/x"], tmp_path / "y", digest=MD5)


def test_every_source_and_reason_is_told(server: BrokenServer, tmp_path: Path) -> None:
    wrong = hashlib.md5(bytes(byte ^ 1 for byte in DATA)).hexdigest()
    wrong = f"150kB of wrong bytes: md5 {wrong}, expected {MD5[4:]}"
    said = f"could not download x.bin: {server.host} (HTTP status 404); {server.host} ({wrong})"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        get(server, tmp_path / "x.bin", "/missing/file", "/wrong/file")


def test_a_slow_source_is_left_at_once_for_a_fast_one(
    server: BrokenServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    get(server, tmp_path / "x.bin", "/slow/file", "/file")
    assert re.search(r"only [3-7]\d\.\dkB/s\n", capsys.readouterr().err)
    assert server.hits == {"/slow/file": 1, "/file": 1}


def test_a_slow_source_is_better_than_none(server: BrokenServer, tmp_path: Path) -> None:
    path = get(server, tmp_path / "x.bin", "/slow/file", "/missing/file")
    assert path.read_bytes() == DATA
    assert server.hits == {"/slow/file": 2, "/missing/file": 2}


def test_an_existing_file_is_neither_read_nor_replaced(
    server: BrokenServer, tmp_path: Path
) -> None:
    (tmp_path / "x.bin").write_bytes(b"mine")
    before = (tmp_path / "x.bin").stat().st_mtime_ns, tmp_path.stat().st_mtime_ns
    get(server, tmp_path / "x.bin", "/file")
    # The folder is untouched too, so not even a lock was made: it may be a read-only one.
    assert ((tmp_path / "x.bin").stat().st_mtime_ns, tmp_path.stat().st_mtime_ns) == before
    assert os.listdir(tmp_path) == ["x.bin"]
    assert not server.hits


def _fetch_and_say(said: Path, *args: object, **options: object) -> None:
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    fetch(*args, **options)  # type: ignore[arg-type]


def test_of_four_processes_one_downloads(server: BrokenServer, tmp_path: Path) -> None:
    server.slow_rate = 40_000
    folder, said = tmp_path / "there", tmp_path / "said"
    args = (said, [server.url("/slow/file")], folder / "x.bin")
    processes = [
        FORKS.Process(target=_fetch_and_say, args=args, kwargs={"digest": SHA256}) for _ in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert server.hits == {"/slow/file": 1}
    assert (folder / "x.bin").read_bytes() == DATA
    assert os.listdir(folder) == ["x.bin"]
    assert said.read_text().count("waiting for another process to download x.bin\n") == 3
    assert said.read_text().count("downloaded x.bin: 150kB in") == 1


def test_a_killed_download_leaves_nothing_under_the_name_and_the_next_succeeds(
    server: BrokenServer, tmp_path: Path
) -> None:
    path = tmp_path / "x.bin"
    killed = FORKS.Process(
        target=fetch,
        args=([server.url("/stall/file")], path),
        kwargs={"digest": MD5, "stall_seconds": 60},
    )
    killed.start()
    deadline = time.monotonic() + 60
    while not any(part.stat().st_size for part in tmp_path.glob(".x.bin.*.part")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    killed.kill()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert not path.exists()
    assert get(server, path, "/file").read_bytes() == DATA
    assert os.listdir(tmp_path) == ["x.bin"], "what the killed one left is gone too"


def test_after_a_failed_download_a_waiting_process_tries_itself(
    server: BrokenServer, tmp_path: Path
) -> None:
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
    assert sorted(os.listdir(tmp_path)) == ["x.bin"]


def test_a_source_that_was_left_is_disconnected(server: BrokenServer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"could not download x\.bin") as caught:
        get(server, tmp_path / "x.bin", "/endless/file")
    deadline = time.monotonic() + 3  # the server itself would wait for 5 s
    while any("process_request" in thread.name for thread in threading.enumerate()):
        assert time.monotonic() < deadline, f"still connected after: {caught.value}"
        time.sleep(0.02)


def test_an_interrupt_leaves_nothing(server: BrokenServer, tmp_path: Path) -> None:
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # shells make background jobs ignore it
    try:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt, match=r"^$"):
            get(server, tmp_path / "x.bin", "/stall/file", stall_seconds=20)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - start < 5
    assert server.hits["/stall/file"] == 1
    assert left(tmp_path) == []


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
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (room, limits[1])
    )  # writing fails beyond it, as on a full disk
    try:
        with pytest.raises(UserError, match=f"^cannot write to {tmp_path}: "):
            get(server, tmp_path / "x.bin", "/file", "/unsaid/file")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert server.hits == {"/file": 1}
    assert left(tmp_path) == []


@pytest.mark.parametrize("url", ["ftp://host/x", "file:///etc/passwd", "/etc/passwd", "https:///x"])
def test_other_addresses_are_refused(server: BrokenServer, tmp_path: Path, url: str) -> None:
    with pytest.raises(UserError, match="not an http or https address"):
        fetch([server.url("/file"), url], tmp_path / "x.bin", digest=MD5)
    assert not server.hits


@pytest.mark.parametrize(
    "digest", ["", "md5:", "sha256:1234567", "sha1:" + "0" * 40, "md5:not-hexadecimal"]
)
def test_a_digest_that_proves_nothing_is_refused(tmp_path: Path, digest: str) -> None:
    with pytest.raises(ValueError, match="digest"):
        fetch([], tmp_path / "x.bin", digest=digest)


def test_without_a_terminal_two_lines_are_shown(
    server: BrokenServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    get(server, tmp_path / "x.bin", "/file")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"downloading x.bin from {server.host} (150kB)"
    assert lines[1].startswith("downloaded x.bin: 150kB in ")
    assert len(lines) == 2


def test_a_slow_source_alone_is_never_left_and_a_terminal_shows_a_bar(
    server: BrokenServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    get(server, tmp_path / "x.bin", "/slow/file")
    assert f"x.bin from {server.host}: " in (said := capsys.readouterr().err)
    assert "k/150k [" in said
    assert server.hits == {"/slow/file": 1}


@pytest.fixture
def proxy(server: BrokenServer, monkeypatch: pytest.MonkeyPatch) -> BrokenServer:
    """The server as a proxy for all addresses, which are then what it is asked for."""
    for name in ("no_proxy", "NO_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", f"http://me:secret@{server.host}")
    server.files["http://mirror.test/file"] = DATA
    return server


def test_a_proxy_is_used_unless_the_environment_excepts_the_host(
    proxy: BrokenServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = fetch(["http://mirror.test/file"], tmp_path / "x.bin", digest=MD5, stall_seconds=STALL)
    assert path.read_bytes() == DATA
    assert proxy.hits == {"http://mirror.test/file": 1}
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    assert get(proxy, tmp_path / "y.bin", "/file").read_bytes() == DATA
    assert proxy.hits["/file"] == 1


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "ALL_PROXY"])
@pytest.mark.parametrize(
    ("value", "why"),
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
    why: str,
) -> None:
    monkeypatch.delenv("HTTP_PROXY")
    monkeypatch.setenv(variable, value := value.replace("SERVER", proxy.host))
    address = value.rpartition("@")[2]
    words = rf"mirror\.test through the proxy '{address}' \({why}\)"
    with pytest.raises(UserError, match=words) as told:
        fetch(["http://mirror.test/refused"], tmp_path / "x.bin", digest=MD5, stall_seconds=STALL)
    assert "secret" not in f"{told.value}{capfd.readouterr()}"
