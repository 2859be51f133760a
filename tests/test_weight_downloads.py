"""Weights from torch's and the Hugging Face cache: verified, and fetched once more when damaged."""

import hashlib
import multiprocessing
import threading
import time
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from broken_server import BEHAVIOURS, BrokenServer
from safetensors.torch import save
from torchvision import models

from cifar_transfer import TransferClassifier
from cifar_transfer.base import download
from cifar_transfer.base.download import fetch
from cifar_transfer.base.errors import UserError
from cifar_transfer.data import cifar
from cifar_transfer.network import build, weights

TINY = "shufflenet_v2_x0_5"
VIT = "timm/test_vit"


def assert_arrived(model, state):
    """Every tensor of the model but the head's is that of `state`."""
    own = {
        key: value
        for key, value in model.network.state_dict().items()
        if not key.startswith(model.heads)
    }
    assert own
    assert all(torch.equal(value, state[key]) for key, value in own.items())


def test_no_network_names_the_three_ways_out(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    entry = models.get_model_weights(TINY).DEFAULT
    monkeypatch.setattr(
        type(entry), "url", f"http://127.0.0.1:9/{entry.url.rsplit('/', 1)[-1]}", raising=False
    )
    with pytest.raises(UserError, match=r"copy the file to .*weights=FILE.*weights=none"):
        TransferClassifier(TINY, "DEFAULT")


class Hub(BaseHTTPRequestHandler):
    """As much of the Hugging Face Hub as a download asks for."""

    content = b""
    broken = False  # sends zeros instead
    stalls = ""  # the method that never gets a whole answer
    served: ClassVar[list[str]] = []

    def do_GET(self):
        if (
            self.command == self.stalls
        ):  # a byte now and then, so that no time-out of a socket fires
            with suppress(OSError):
                self.wfile.write(b"HTTP/1.0 200 OK\r\nX-Never-Ending: ")
                while True:
                    self.wfile.write(b"x")
                    time.sleep(0.05)
        if not self.path.endswith("/model.safetensors"):
            self.send_error(404)
            return
        digest = hashlib.sha256(self.content).hexdigest()
        self.send_response(200)
        for key, value in (
            ("X-Repo-Commit", "c" * 40),
            ("ETag", f'"{digest}"'),
            ("X-Linked-Etag", f'"{digest}"'),
            ("X-Linked-Size", str(len(self.content))),
            ("Content-Length", str(len(self.content))),
        ):
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.served.append(self.path)
            self.wfile.write(bytes(len(self.content)) if self.broken else self.content)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    pytest.importorskip("timm", reason="timm is an optional extra")
    import huggingface_hub.constants as constants

    Hub.content, Hub.served = save(build.stock(VIT).state_dict()), []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        address + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    yield server
    server.shutdown()


def test_timms_weights_come_from_the_hub_and_a_damaged_file_is_fetched_once_more(
    hub, tmp_path, caplog, monkeypatch
):
    name = f"{VIT}.r160_in1k"
    model = TransferClassifier(name, "DEFAULT", num_classes=3, image_size=160)
    assert len(Hub.served) == 1
    assert "r160_in1k" in Hub.served[0]
    TransferClassifier(VIT, "r160_in1k", num_classes=3, image_size=160)
    assert len(Hub.served) == 1, "from the cache"
    (blob,) = (tmp_path / "hub").glob("models--*/blobs/*")
    content = blob.read_bytes()
    blob.write_bytes(content[:-100] + bytes(100))  # same size, other numbers
    with caplog.at_level("INFO"):
        again = TransferClassifier(name, "DEFAULT", num_classes=3, image_size=160)
    assert "is not the published file (SHA-256 " in caplog.text
    (aside,) = blob.parent.glob("*.other-*")
    assert aside.read_bytes() == content[:-100] + bytes(100), "it is kept"
    assert len(Hub.served) == 2
    assert blob.read_bytes() == content
    assert_arrived(again, model.network.state_dict())
    monkeypatch.setattr(Hub, "broken", True)
    blob.write_bytes(b"")
    with pytest.raises(UserError, match=r"of wrong bytes.*Three ways out"):
        TransferClassifier(name, "DEFAULT", num_classes=3)


def test_without_the_hub_there_are_three_ways_out(hub, monkeypatch):
    hub.shutdown()
    hub.server_close()
    with pytest.raises(
        UserError, match=r"could not be fetched \(.*\)\. Three ways out: .*weights=FILE"
    ):
        TransferClassifier(f"{VIT}.r160_in1k", "DEFAULT")


@pytest.mark.parametrize(
    ("method", "why"), [("HEAD", "no answer within 1 s"), ("GET", "silent for 1 s")]
)
def test_a_hub_that_sends_a_byte_now_and_then_is_left(hub, tmp_path, monkeypatch, method, why):
    monkeypatch.setattr(Hub, "stalls", method)
    monkeypatch.setattr(weights, "HUB_SECONDS", 1)
    monkeypatch.setattr(weights, "fetch", partial(fetch, stall_seconds=1))
    began = time.monotonic()
    with pytest.raises(UserError, match=rf"{why}.*Three ways out"):
        TransferClassifier(f"{VIT}.r160_in1k", "DEFAULT")
    assert time.monotonic() - began < 20
    assert not list((tmp_path / "hub").glob("models--*/snapshots/*/*"))


CONTENT = bytes(range(256)) * 1000
GOOD = ("ok", "slow", "unsaid", "overlong")


def source(what, home, url):
    """Where the file of a kind belongs below a folder, and the call of the product that fetches it from a server."""
    digest = hashlib.sha256(CONTENT).hexdigest()
    if what == "data":
        cifar.ARCHIVE_MD5 = hashlib.md5(CONTENT).hexdigest()
        return home / cifar.ARCHIVE, partial(cifar.download, home, url)
    if what == "torchvision":
        torch.hub.set_dir(home)
        name = url.rpartition("/")[2]
        return home / "checkpoints" / name, partial(weights._fetch, url, 0.25)
    import huggingface_hub.constants

    huggingface_hub.constants.HF_HUB_CACHE = str(home)
    found = SimpleNamespace(etag=digest, location=url, size=len(CONTENT))
    huggingface_hub.get_hf_file_metadata = lambda _: found
    path = home / "models--a--b" / "blobs" / digest
    huggingface_hub.hf_hub_download = lambda *_, **options: path if path.is_file() else _absent()
    return path, partial(weights._from_hub, SimpleNamespace(hub=("a/b", "model.safetensors")))


def _absent():
    from huggingface_hub.errors import LocalEntryNotFoundError

    raise LocalEntryNotFoundError("not in the cache")


@pytest.fixture
def restored(monkeypatch):
    """What `source` changes is as before, afterwards."""
    import huggingface_hub.constants

    monkeypatch.setattr(cifar, "ARCHIVE_MD5", cifar.ARCHIVE_MD5)
    monkeypatch.setattr(
        huggingface_hub.constants, "HF_HUB_CACHE", huggingface_hub.constants.HF_HUB_CACHE
    )
    for name in ("get_hf_file_metadata", "hf_hub_download"):
        monkeypatch.setattr(huggingface_hub, name, getattr(huggingface_hub, name))
    before = torch.hub.get_dir()
    yield
    torch.hub.set_dir(before)


NAME = f"w-{hashlib.sha256(CONTENT).hexdigest()[:8]}.pth"


@pytest.mark.parametrize("behaviour", [name for name in BEHAVIOURS if name not in GOOD])
@pytest.mark.parametrize("what", ["data", "torchvision", "hub"])
def test_a_broken_server_leaves_no_file_and_a_way_out(
    tmp_path, monkeypatch, restored, what, behaviour
):
    """Or, where the second attempt is good, the file."""
    for module in (cifar, weights):
        monkeypatch.setattr(module, "fetch", partial(fetch, stall_seconds=0.4))
    monkeypatch.setattr(download, "PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(cifar, "ARCHIVE_BYTES", len(CONTENT))
    with BrokenServer({f"/{NAME}": CONTENT}) as server:
        path, get = source(what, tmp_path, server.url(f"/{behaviour}/{NAME}"))
        began = time.monotonic()
        if behaviour == "once_500":
            assert get().read_bytes() == CONTENT
            return
        with pytest.raises(UserError, match=rf"{server.host}.*Three ways out"):
            get()
        assert time.monotonic() - began < 10
    assert not path.exists()


def fetch_one(what, home, url):
    """A process of its own."""
    path, get = source(what, home, url)
    assert get() == path


@pytest.mark.parametrize("what", ["data", "torchvision", "hub"])
def test_of_four_processes_one_downloads(tmp_path, restored, what):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["cifar_transfer.weights", __name__]
    )  # else each imports torch for itself
    with BrokenServer({f"/{NAME}": CONTENT}, slow_rate=200_000) as server:
        url = server.url(f"/slow/{NAME}")
        four = [context.Process(target=fetch_one, args=(what, tmp_path, url)) for _ in range(4)]
        for process in four:
            process.start()
        for process in four:
            process.join(120)
        assert [process.exitcode for process in four] == [0] * 4
        assert server.hits.total() == 1
    assert source(what, tmp_path, url)[0].read_bytes() == CONTENT


def test_the_library_says_how_large_a_file_may_be(monkeypatch):
    """ResNet18's has 46,830,571 bytes; a body without end is left a little after, not after gigabytes."""
    asked = {}
    monkeypatch.setattr(
        weights, "fetch", lambda *_, **options: asked.update(options) or Path("unread")
    )
    monkeypatch.setattr(weights, "read_file", lambda path: ({}, {}))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: "/nowhere")
    weights.read("resnet18", "DEFAULT")
    assert 46_830_571 < asked["max_bytes"] < 48_000_000


def test_weights_in_torchs_cache_are_used_and_a_damaged_file_is_fetched_once_more(
    tmp_path, monkeypatch, caplog
):
    torch.save(models.get_model(TINY).state_dict(), tmp_path / "w.pth")
    content = (tmp_path / "w.pth").read_bytes()
    name = f"tiny-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / name).write_bytes(content)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path / "site")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/{name}"
        cached = weights._fetch(url)
        assert cached == tmp_path / "checkpoints" / name
        cached.write_bytes(content[:-1])
        with caplog.at_level("INFO"):
            assert weights._fetch(url).read_bytes() == content
        assert f"{name} is not the published file (SHA-256 " in caplog.text
        (aside,) = cached.parent.glob("*.other-*")
        assert aside.read_bytes() == content[:-1], "it is kept"
        server.shutdown()
    assert weights._fetch(url).read_bytes() == content, "without the server, from the cache"
    cached.write_bytes(content[:-1])
    with pytest.raises(UserError, match="could not download"):
        weights._fetch(url)
