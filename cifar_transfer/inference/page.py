"""The server of a page, `page.html`, that classifies images. It reads files as `predict` does.

Other sites cannot use it. Their requests have another Origin, they cannot send `CONTENT_TYPE`
without asking first, and if a name of theirs comes to stand for this machine (DNS rebinding), the
Host is another one.
"""

import io
import json
import os
import re
import socket
import sys
from base64 import b64encode
from hashlib import sha256
from http.server import BaseHTTPRequestHandler
from ipaddress import ip_address
from pathlib import Path
from socketserver import ThreadingTCPServer
from threading import BoundedSemaphore, Lock, Timer
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from matplotlib import colormaps
from PIL import Image

from cifar_transfer.base.errors import UserError
from cifar_transfer.inference.explain import heat_map
from cifar_transfer.inference.predictor import Classifier
from cifar_transfer.results.predictions import Predictions, predictions_path

MAX_FILE_BYTES = 32 * 2**20
MAX_CONNECTIONS = 32  # at a time; each may hold a file of that size
MAX_CONNECTION_SECONDS = 60
MAX_SILENT_SECONDS = 10  # of a connection
MAX_EXAMPLES = 10  # classes of which an image is offered
CONTENT_TYPE = "application/octet-stream"  # of a file that is sent
HEAT_COLORMAP = "plasma"
HEAT_OPACITY = 0.75  # where the heat is 1; where it is 0 the image is seen


class Page(ThreadingTCPServer):
    """The server of the page. `serve_forever` begins; `url` is its address.

    Args:
        ckpt: Checkpoint of a run. A test image of each class is offered as an example.
        classifier: The classifier of the checkpoint. It is asked for one image at a time.
        host: Name or address of this machine to listen at.
        port: Port to listen at; 0 for any that is free.

    Raises:
        UserError: It cannot listen there.
    """

    allow_reuse_address = os.name == "posix"  # elsewhere it would share a port that is taken
    daemon_threads = True

    def __init__(self, ckpt: Path, classifier: Classifier, host: str, port: int) -> None:
        self.classifier = classifier
        self.places = BoundedSemaphore(MAX_CONNECTIONS)
        self._turn = Lock()
        page = Path(__file__).with_name("page.html").read_text("utf-8")
        self.content_security_policy = _content_security_policy(page)
        about = {
            "network": classifier.model.backbone,
            "classes": len(classifier.class_names),
            "size": classifier.size,
            "most_bytes": MAX_FILE_BYTES,
            "examples": _examples(ckpt),
        }
        self.files = {
            "/": (page, "text/html; charset=utf-8"),
            "/about": (json.dumps(about), "application/json"),
        }
        self._listen(host, port)

    def _listen(self, host: str, port: int) -> None:
        try:
            addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            self.address_family = addresses[0][0]
            address = str(addresses[0][4][0])
            super().__init__((address, port), _Request)
        except (OSError, UnicodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "no name"
            raise UserError(
                f"The page cannot be at port {port} of {host} ({reason}): name another --port, or "
                "0 for any that is free, and as --host a name or address of this machine."
            ) from None
        address, port = self.socket.getsockname()[:2]
        # Names by which this machine may be asked; None for any, if others can reach it.
        self.host_names: set[str] | None = None
        if ip_address(address).is_loopback:
            self.host_names = {"localhost", "127.0.0.1", "::1", host}
        url_host = f"[{host}]" if ":" in host else host
        self.url = f"http://{url_host}:{port}/"

    def answer(self, content: bytes) -> dict[str, Any]:
        """Return what the page shows of an image.

        Args:
            content: Bytes of an image's file.

        Raises:
            UserError: The image cannot be read.
        """
        with self._turn:
            prediction = next(self.classifier.stream([content]))
            answer = {
                "classes": prediction.classes,
                "seen": _png_url(prediction.pixels.transpose(1, 2, 0)),
            }
            try:
                heat = heat_map(self.classifier.model, prediction.pixels)
            except UserError as error:
                answer["no_heat"] = str(error)
                return answer
        if heat.any():
            colours = colormaps[HEAT_COLORMAP](heat, alpha=HEAT_OPACITY * heat, bytes=True)
            answer["heat"] = _png_url(colours)
        else:
            answer["no_heat"] = "Nothing in the image speaks for this class."
        return answer

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Return whether there is a place for one more connection, and take it."""
        return self.places.acquire(blocking=False)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer a connection, and leave its place."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing about connections that broke off."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class _Request(BaseHTTPRequestHandler):
    """A connection, and its request."""

    server: Page
    timeout = MAX_SILENT_SECONDS
    server_version = "cifar_transfer"
    sys_version = ""

    def handle(self) -> None:
        deadline = Timer(MAX_CONNECTION_SECONDS, self.request.shutdown, [socket.SHUT_RDWR])
        deadline.start()
        try:
            super().handle()
        finally:
            deadline.cancel()

    def parse_request(self) -> bool:
        if not super().parse_request():
            return False
        if self._is_for_this_page():
            return True
        self.send_error(403, f"Other sites cannot use this page: open {self.server.url}.")
        return False

    def _is_for_this_page(self) -> bool:
        host = self.headers.get("Host", "")
        origin = self.headers.get("Origin")
        host_names = self.server.host_names
        try:
            if host_names is not None and urlsplit(f"//{host}").hostname not in host_names:
                return False
            return origin is None or urlsplit(origin).netloc == host
        except ValueError:  # no address
            return False

    def do_GET(self) -> None:
        if self.path in self.server.files:
            text, content_type = self.server.files[self.path]
            self._send(200, text, content_type)
        else:
            self.send_error(404)

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if self.headers.get("Content-Type") != CONTENT_TYPE:
            self.send_error(415, f"Send the bytes of a file as {CONTENT_TYPE}.")
            return
        if not re.fullmatch("[0-9]{1,12}", length):
            self.send_error(411, "Say with Content-Length how many bytes come.")
            return
        if int(length) > MAX_FILE_BYTES:
            mebibytes = MAX_FILE_BYTES >> 20
            self.send_error(413, f"The file has more than {mebibytes} MiB: make it smaller.")
            return
        content = self.rfile.read(int(length))
        if len(content) < int(length):
            self.send_error(400, "The file broke off: send it again.")
            return
        try:
            answer = self.server.answer(content)
        except UserError as error:
            self.send_error(400, str(error))
            return
        self._send(200, json.dumps(answer))

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        self._send(code, json.dumps({"error": message or self.responses[code][0]}))

    def _send(self, code: int, text: str, content_type: str = "application/json") -> None:
        self.send_response(code)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Security-Policy", self.server.content_security_policy)
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text.encode())

    def log_message(self, *_: Any) -> None:
        pass


def _content_security_policy(page: str) -> str:
    """Return rules that let the page use nothing but its own script, style and images."""
    rules = [
        "default-src 'none'",
        "img-src data: blob:",
        "connect-src 'self' data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
    for tag in ("script", "style"):
        text = page.split(f"<{tag}>")[1].split(f"</{tag}>")[0]
        digest = b64encode(sha256(text.encode()).digest()).decode()
        rules.append(f"{tag}-src 'sha256-{digest}'")
    return "; ".join(rules)


def _examples(ckpt: Path) -> list[tuple[str, str]]:
    """Return classes with a test image of each that the run of a checkpoint has kept, as PNG."""
    try:
        predictions = Predictions.load(predictions_path(ckpt.parents[1], "test"))
    except Exception:  # of any kind: the run may be anybody's, and have none
        return []
    return _first_of_each_class(predictions)


def _first_of_each_class(predictions: Predictions) -> list[tuple[str, str]]:
    images = {}
    labels = predictions.labels[predictions.rows].tolist()
    for label, image in zip(labels, predictions.images.numpy(), strict=True):
        # Mistakes come first; a correct prediction takes the place of one.
        images[predictions.names[label]] = image
    examples = []
    for name in sorted(images)[:MAX_EXAMPLES]:
        examples.append((name, _png_url(images[name].transpose(1, 2, 0))))
    return examples


def _png_url(pixels: np.ndarray) -> str:
    """Return an image, uint8 [H, W, 3 or 4], RGB or RGBA, as a data URL."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return f"data:image/png;base64,{b64encode(file.getvalue()).decode()}"
