"""The server of a page, `page.html`, that classifies images; a file that is sent is read as `predict` reads files.

Other sites cannot use it: they have another Origin, cannot send `KIND` without asking first, and where a name of theirs
comes to stand for this machine (DNS rebinding), it is another Host.
"""

import io
import json
import os
import re
import socket
import sys
from base64 import b64encode
from contextlib import suppress
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

MOST_BYTES = 32 * 2**20  # of an image's file
MOST_CONNECTIONS = 32  # at a time, each of which may hold such a file
MOST_SECONDS = 60  # that a connection may last
EXAMPLES = 10  # classes of which an image is offered
KIND = "application/octet-stream"
RULES = "default-src 'none'; img-src data: blob:; connect-src 'self' data:; base-uri 'none'; form-action 'none'; "


class Page(ThreadingTCPServer):
    """The server of the page: `serve_forever` begins, `url` is where.

    Args:
        ckpt: Checkpoint of a run, one of whose test images of each class is offered as an example.
        classifier: That of the checkpoint; it is asked one image at a time.
        host: Name or address of this machine to listen at.
        port: 0 for any that is free.

    Raises:
        UserError: They cannot be listened at.
    """

    allow_reuse_address = os.name == "posix"  # elsewhere it would share a port that is taken
    daemon_threads = True

    def __init__(self, ckpt: Path, classifier: Classifier, host: str, port: int) -> None:
        self.classifier, self.turn, self.places = (
            classifier,
            Lock(),
            BoundedSemaphore(MOST_CONNECTIONS),
        )
        page = Path(__file__).with_name("page.html").read_text("utf-8")
        inline = [
            (tag, page.split(f"<{tag}>")[1].split(f"</{tag}>")[0]) for tag in ("script", "style")
        ]
        sums = [
            f"{tag}-src 'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"
            for tag, text in inline
        ]
        self.rules = RULES + "; ".join(["frame-ancestors 'none'", *sums])
        examples: list[tuple[str, str]] = []
        with suppress(Exception):  # of any kind: the run may be anybody's, and have none
            kept = Predictions.load(predictions_path(ckpt.parents[1], "test"))
            names = [kept.names[label] for label in kept.labels[kept.rows].tolist()]
            # Mistakes come first, and what is predicted right takes their places.
            chosen = sorted(dict(zip(names, kept.images.numpy(), strict=True)).items())[:EXAMPLES]
            examples = [(name, _png(image.transpose(1, 2, 0))) for name, image in chosen]
        about = {"network": classifier.model.backbone, "classes": len(classifier.names)}
        about |= {"size": classifier.size, "most_bytes": MOST_BYTES, "examples": examples}
        self.files = {
            "/": (page, "text/html; charset=utf-8"),
            "/about": (json.dumps(about), "application/json"),
        }
        try:
            self.address_family, *_, address = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM
            )[0]
            super().__init__((str(address[0]), port), _Request)
        except (OSError, UnicodeError) as error:  # the latter of what is no name
            why = error.strerror if isinstance(error, OSError) else "no name"
            raise UserError(
                f"The page cannot be at port {port} of {host} ({why}): name another --port, or 0 for any "
                f"that is free, and as --host a name or address of this machine."
            ) from None
        where, port = self.socket.getsockname()[:2]
        self.hosts = (
            {"localhost", "127.0.0.1", "::1", host} if ip_address(where).is_loopback else None
        )
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}/"

    def answer(self, content: bytes) -> dict[str, Any]:
        """What the page shows of an image; a `UserError` if that cannot be read."""
        with self.turn:
            prediction = next(self.classifier.stream([content]))
            shown = {
                "classes": prediction.classes,
                "seen": _png(prediction.pixels.transpose(1, 2, 0)),
            }
            try:
                heat = heat_map(self.classifier.model, prediction.pixels)
            except UserError as error:
                return shown | {"no_heat": str(error)}
            if not heat.any():
                return shown | {"no_heat": "Nothing in the image speaks for this class."}
            return shown | {"heat": _png(colormaps["plasma"](heat, alpha=0.75 * heat, bytes=True))}

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Whether one more connection is not too many."""
        return self.places.acquire(blocking=False)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer a connection, and leave its place."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of connections that broke off."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class _Request(BaseHTTPRequestHandler):
    server: Page
    timeout = 10  # seconds of silence
    server_version, sys_version = "cifar_transfer", ""

    def handle(self) -> None:
        end = Timer(MOST_SECONDS, self.request.shutdown, [socket.SHUT_RDWR])
        end.start()
        try:
            super().handle()
        finally:
            end.cancel()

    def parse_request(self) -> bool:
        if not super().parse_request():
            return False
        host, origin, hosts = (
            self.headers.get("Host", ""),
            self.headers.get("Origin"),
            self.server.hosts,
        )
        with suppress(ValueError):
            known = not hosts or urlsplit(f"//{host}").hostname in hosts
            if known and (origin is None or urlsplit(origin).netloc == host):
                return True
        self.send_error(403, f"Other sites cannot use this page: open {self.server.url}.")
        return False

    def do_GET(self) -> None:
        if file := self.server.files.get(self.path):
            self._send(200, *file)
        else:
            self.send_error(404)

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if self.headers.get("Content-Type") != KIND:
            self.send_error(415, f"Send the bytes of a file as {KIND}.")
        elif not re.fullmatch("[0-9]{1,12}", length):
            self.send_error(411, "Say with Content-Length how many bytes come.")
        elif int(length) > MOST_BYTES:
            self.send_error(413, f"The file has more than {MOST_BYTES >> 20} MiB: make it smaller.")
        elif len(content := self.rfile.read(int(length))) < int(length):
            self.send_error(400, "The file broke off: send it again.")
        else:
            try:
                self._send(200, json.dumps(self.server.answer(content)))
            except UserError as error:
                self.send_error(400, str(error))

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        self._send(code, json.dumps({"error": message or self.responses[code][0]}))

    def _send(self, code: int, text: str, kind: str = "application/json") -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Security-Policy", self.server.rules)
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(text.encode() if self.command != "HEAD" else b"")

    def log_message(self, *_: Any) -> None:
        pass


def _png(pixels: np.ndarray) -> str:
    """An image uint8 [H, W, 3 or 4], RGB or RGBA, as an address."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return f"data:image/png;base64,{b64encode(file.getvalue()).decode()}"
