"""Weights from torch's and the Hugging Face cache: verified, and fetched once more when damaged."""

import hashlib
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest
import torch
from safetensors.torch import save
from torchvision import models

from cifar_transfer import TransferClassifier, networks, weights
from cifar_transfer.errors import UserError

TINY = "shufflenet_v2_x0_5"
VIT = "timm/test_vit"


def assert_arrived(model, state):
    """Every tensor of the model but the head's is that of `state`."""
    own = {key: value for key, value in model.network.state_dict().items() if not key.startswith(model.heads)}
    assert own
    assert all(torch.equal(value, state[key]) for key, value in own.items())


def test_no_network_names_the_three_ways_out(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    entry = models.get_model_weights(TINY).DEFAULT
    monkeypatch.setattr(type(entry), "url", f"http://127.0.0.1:9/{entry.url.rsplit('/', 1)[-1]}", raising=False)
    with pytest.raises(UserError, match=r"copy the file to .*--model\.weights=FILE.*--model\.weights=none"):
        TransferClassifier(TINY, "DEFAULT")


class Hub(BaseHTTPRequestHandler):
    """As much of the Hugging Face Hub as a download asks for."""

    content = b""
    broken = False  # sends zeros instead
    served: ClassVar[list[str]] = []

    def do_GET(self):
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

    Hub.content, Hub.served = save(networks.stock(VIT).state_dict()), []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    yield server
    server.shutdown()


def test_timms_weights_come_from_the_hub_and_a_damaged_file_is_fetched_once_more(hub, tmp_path, caplog, monkeypatch):
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
    assert "is damaged; it is downloaded again" in caplog.text
    assert len(Hub.served) == 2
    assert blob.read_bytes() == content
    assert_arrived(again, model.network.state_dict())
    monkeypatch.setattr(Hub, "broken", True)
    blob.write_bytes(b"")
    with pytest.raises(UserError, match="arrived damaged"):
        TransferClassifier(name, "DEFAULT", num_classes=3)


def test_without_the_hub_there_are_three_ways_out(hub, monkeypatch):
    hub.shutdown()
    hub.server_close()
    with pytest.raises(UserError, match=r"could not be fetched \(.*\)\. Three ways out: .*model\.weights=FILE"):
        TransferClassifier(f"{VIT}.r160_in1k", "DEFAULT")


def test_weights_in_torchs_cache_are_used_and_a_damaged_file_is_fetched_once_more(tmp_path, monkeypatch, caplog):
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
        assert f"{name} is damaged; it is downloaded again" in caplog.text
        server.shutdown()
    assert weights._fetch(url).read_bytes() == content, "without the server, from the cache"
    cached.write_bytes(content[:-1])
    with pytest.raises(UserError, match="could not download"):
        weights._fetch(url)
