"""Weights in torch's and the Hugging Face cache: verified, and downloaded again when damaged."""

import hashlib
import threading
import time
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pooch
import pytest
import torch
from broken_server import BrokenServer
from conftest import FORKS
from safetensors.torch import save
from torchvision import models

from cifar_transfer import TransferClassifier
from cifar_transfer.base import download
from cifar_transfer.base.download import fetch
from cifar_transfer.base.errors import UserError
from cifar_transfer.data import cifar
from cifar_transfer.network import catalog, weights, weights_download
from cifar_transfer.network.build import build_stock
from cifar_transfer.network.weights_download import published_file

TINY = "shufflenet_v2_x0_5"
VIT = "timm/test_vit"
CONTENT = bytes(range(256)) * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()
NAME = f"w-{SHA256[:8]}.pth"


def torchvision_entry(url):
    return SimpleNamespace(hub=None, url=url, mebibytes=0.25)


HUB_ENTRY = SimpleNamespace(hub=("somebody/network", "model.safetensors"))


def test_without_a_network_three_ways_out_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    entry = models.get_model_weights(TINY).DEFAULT
    url = f"http://127.0.0.1:9/{entry.url.rsplit('/', 1)[-1]}"
    monkeypatch.setattr(type(entry), "url", url, raising=False)
    with pytest.raises(UserError, match=r"copy the file to .*weights=FILE.*weights=none"):
        TransferClassifier(TINY, "DEFAULT")


class Hub(ThreadingHTTPServer):
    """As much of the Hugging Face Hub as a download asks for: one file of any repository."""

    def __init__(self, content):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.content = content
        self.file_name = "model.safetensors"
        self.sends_zeros = False
        self.stalling_method = ""
        self.served_paths = []


class HubHandler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self):
        if self.command == self.server.stalling_method:
            self._send_byte_by_byte()
        if not self.path.endswith(f"/{self.server.file_name}"):
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()
            return
        content = self.server.content
        digest = hashlib.sha256(content).hexdigest()
        self.send_response(200)
        self.send_header("X-Repo-Commit", "c" * 40)
        self.send_header("ETag", f'"{digest}"')
        self.send_header("X-Linked-Etag", f'"{digest}"')
        self.send_header("X-Linked-Size", str(len(content)))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.server.served_paths.append(self.path)
            self.wfile.write(bytes(len(content)) if self.server.sends_zeros else content)

    do_HEAD = do_GET

    def _send_byte_by_byte(self):
        """Send a header without end, so that no time-out of a socket fires."""
        with suppress(OSError):
            self.wfile.write(b"HTTP/1.0 200 OK\r\nX-Never-Ending: ")
            while True:
                self.wfile.write(b"x")
                time.sleep(0.05)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants", reason="comes with timm")
    with Hub(CONTENT) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        yield server
        server.shutdown()


def test_timms_weights_come_from_the_hub_once(hub):
    pytest.importorskip("timm", reason="timm is an optional extra")
    state = build_stock(VIT).state_dict()
    hub.content = save(state)
    model = TransferClassifier(f"{VIT}.r160_in1k", "DEFAULT", num_classes=3, image_size=160)
    for name, value in model.network.state_dict().items():
        if not name.startswith(model.heads):
            assert torch.equal(value, state[name]), name
    TransferClassifier(VIT, "r160_in1k", num_classes=3, image_size=160)
    assert len(hub.served_paths) == 1
    assert "r160_in1k" in hub.served_paths[0]


def test_a_damaged_file_in_the_hubs_cache_is_kept_aside_and_downloaded_again(hub, caplog):
    path = published_file(HUB_ENTRY)
    blob = path.resolve()
    damaged = CONTENT[:-100] + bytes(100)
    blob.write_bytes(damaged)
    with caplog.at_level("INFO"):
        path = published_file(HUB_ENTRY)
    assert "is not the published file (SHA-256 " in caplog.text
    (aside,) = blob.parent.glob("*.other-*")
    assert aside.read_bytes() == damaged
    assert path.read_bytes() == CONTENT
    assert len(hub.served_paths) == 2
    assert published_file(HUB_ENTRY).read_bytes() == CONTENT
    assert len(hub.served_paths) == 2


def test_other_bytes_than_the_hub_announced_are_not_used(hub):
    hub.sends_zeros = True
    for _ in range(2):
        with pytest.raises(UserError, match=r"other bytes arrived .*Three ways out"):
            published_file(HUB_ENTRY)


def test_a_blob_that_is_a_link_into_a_store_of_other_names_is_verified_by_its_own(hub):
    """As huggingface_hub since 2.3 shares files that several repositories have."""
    path = published_file(HUB_ENTRY)
    blob = path.resolve()
    shared = blob.with_name("f" * 64)
    blob.rename(shared)
    blob.symlink_to(shared.name)
    assert published_file(HUB_ENTRY) == path
    shared.write_bytes(b"damaged")
    assert published_file(HUB_ENTRY).read_bytes() == CONTENT


def test_a_repository_without_safetensors_has_another_file(hub):
    hub.file_name = "pytorch_model.bin"
    assert published_file(HUB_ENTRY).name == "pytorch_model.bin"
    assert published_file(HUB_ENTRY).read_bytes() == CONTENT
    assert len(hub.served_paths) == 1


def test_a_repository_without_either_file_is_told(hub):
    hub.file_name = "another.file"
    message = r"could not be fetched \(.*\)\. Three ways out: .*weights=FILE"
    with pytest.raises(UserError, match=message):
        published_file(HUB_ENTRY)


@pytest.mark.whole
def test_without_the_hub_three_ways_out_are_named(hub):
    """huggingface_hub tries for half a minute."""
    hub.shutdown()
    hub.server_close()
    message = r"could not be fetched \(.*\)\. Three ways out: .*weights=FILE"
    with pytest.raises(UserError, match=message):
        published_file(HUB_ENTRY)


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_a_hub_that_sends_a_byte_now_and_then_is_left(hub, tmp_path, monkeypatch, method):
    hub.stalling_method = method
    monkeypatch.setattr(weights_download, "DOWNLOAD_SECONDS", 1)
    with pytest.raises(UserError, match=r"\(not finished after 1 s\)\. Three ways out"):
        published_file(HUB_ENTRY)
    assert not list((tmp_path / "hub").glob("models--*/snapshots/*/*"))


def data_download(home, url):
    """Return where the archive of CIFAR-10 belongs, and the call that downloads it."""
    cifar.ARCHIVE_MD5 = hashlib.md5(CONTENT).hexdigest()
    return home / cifar.ARCHIVE, partial(cifar.download, home, url)


def torchvision_download(home, url):
    """Return where torchvision's file belongs, and the call that downloads it."""
    torch.hub.set_dir(home)
    path = home / "checkpoints" / url.rpartition("/")[2]
    return path, partial(published_file, torchvision_entry(url))


@pytest.fixture
def restored(monkeypatch):
    """Restore afterwards what the two functions above change."""
    monkeypatch.setattr(cifar, "ARCHIVE_MD5", cifar.ARCHIVE_MD5)
    folder = torch.hub.get_dir()
    yield
    torch.hub.set_dir(folder)


@pytest.mark.parametrize("behaviour", ["trickle", "stall", "truncated", "wrong", "missing"])
@pytest.mark.parametrize("prepare", [data_download, torchvision_download])
def test_a_broken_server_leaves_no_file_and_a_way_out(
    tmp_path, monkeypatch, restored, prepare, behaviour
):
    def impatient_fetch(urls, path, **options):
        return fetch(urls, path, **options | {"total_seconds": 1})

    monkeypatch.setattr(cifar, "fetch", impatient_fetch)
    monkeypatch.setattr(weights_download, "fetch", impatient_fetch)
    monkeypatch.setattr(download, "READ_SECONDS", 0.4)
    monkeypatch.setattr(pooch.core, "time", SimpleNamespace(sleep=lambda seconds: None))
    with BrokenServer({f"/{NAME}": CONTENT}) as server:
        path, get = prepare(tmp_path, server.url(f"/{behaviour}/{NAME}"))
        with pytest.raises(UserError, match=rf"{server.host}.*Three ways out"):
            get()
    assert not path.exists()


def download_in_process(prepare, home, url):
    path, get = prepare(home, url)
    assert get() == path


@pytest.mark.slow
@pytest.mark.parametrize("prepare", [data_download, torchvision_download])
def test_of_four_processes_one_downloads(tmp_path, prepare, restored):
    with BrokenServer({f"/{NAME}": CONTENT}, slow_rate=200_000) as server:
        args = (prepare, tmp_path, server.url(f"/slow/{NAME}"))
        processes = [FORKS.Process(target=download_in_process, args=args) for _ in range(4)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
        assert [process.exitcode for process in processes] == [0] * 4
        assert server.hits.total() == 1
    path, _ = prepare(*args[1:])
    assert path.read_bytes() == CONTENT


def test_the_library_says_how_large_a_file_may_be(monkeypatch):
    """ResNet18's file has 46,830,571 bytes; a body without end is left a little after that."""
    options = {}

    def record_options(urls, path, **keywords):
        options.update(keywords)
        return path

    monkeypatch.setattr(weights_download, "fetch", record_options)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: "/nowhere")
    entry = next(iter(catalog.weights("resnet18").values()))
    assert published_file(entry) == Path("/nowhere/checkpoints/resnet18-f37072fd.pth")
    assert 46_830_571 < options["max_bytes"] < 48_000_000


def test_weights_in_torchs_cache_are_used_and_a_damaged_file_is_downloaded_again(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with BrokenServer({f"/{NAME}": CONTENT}) as server:
        entry = torchvision_entry(server.url(f"/{NAME}"))
        path = published_file(entry)
        assert path == tmp_path / "checkpoints" / NAME
        path.write_bytes(CONTENT[:-1])
        with caplog.at_level("INFO"):
            assert published_file(entry).read_bytes() == CONTENT
        assert f"{NAME} is not the published file (SHA-256 " in caplog.text
        (aside,) = path.parent.glob("*.other-*")
        assert aside.read_bytes() == CONTENT[:-1]
    assert published_file(entry).read_bytes() == CONTENT, "without the server, from the cache"
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(UserError, match="could not download"):
        published_file(entry)


def test_a_file_whose_name_has_no_hash_is_not_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    entry = torchvision_entry("http://127.0.0.1:9/weights.pth")
    with pytest.raises(UserError, match="names no hash to verify it by"):
        published_file(entry)
    path = tmp_path / "checkpoints" / "weights.pth"
    path.parent.mkdir()
    path.write_bytes(CONTENT)
    assert published_file(entry) == path


def test_default_weights_are_the_librarys_first(monkeypatch):
    entries = []
    monkeypatch.setattr(weights, "published_file", entries.append)
    monkeypatch.setattr(weights, "read_weights", lambda path: ({}, {}))
    pretrained = weights.read("resnet50", "DEFAULT")
    assert pretrained.published is entries[0]
    assert pretrained.published.name == "IMAGENET1K_V2"
    assert weights.read("resnet50", "IMAGENET1K_V1").published.name == "IMAGENET1K_V1"
