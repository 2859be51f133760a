"""A web server on this machine that misbehaves on request.

The first part of a path chooses the behaviour, the rest the file: `BrokenServer({"/name": b"..."})`
serves `/name` well, `/stall/name` as `stall` below says, and so on for each method of `Behaviours`.
"""

import socket
import struct
import threading
from collections import Counter
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self


class BrokenServer:
    """Serve files from a free port of 127.0.0.1 while used as a context manager.

    Leaving the context ends every answer under way and waits for it.

    Args:
        files: Content of the files by path.
        slow_rate: Bytes per second of `/slow`.

    Attributes:
        hits: Number of requests by path.
    """

    def __init__(self, files: Mapping[str, bytes], slow_rate: float = 20_000) -> None:
        self.files = dict(files)
        self.slow_rate = slow_rate
        self.hits: Counter[str] = Counter()
        self.closing = threading.Event()
        handler = type("Handler", (Behaviours,), {"site": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    def url(self, path: str) -> str:
        """Return the address of `path`."""
        return f"http://{self.host}{path}"

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.closing.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # so that closing waits for the answers under way
    request_queue_size = 64

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: clients that leave in the middle are what the tests are about."""


class Behaviours(BaseHTTPRequestHandler):
    """One method for each misbehaviour; `data` is the content of the file asked for."""

    site: BrokenServer
    timeout = 1.0  # seconds, for a client that neither reads nor leaves

    def do_GET(self) -> None:
        self.site.hits[self.path] += 1
        files = self.site.files
        _, behaviour, *rest = self.path.split("/")
        name = "/" + "/".join(rest)
        if self.path.endswith("/refused"):
            self.send_error(407)  # of a proxy that knows nobody
        elif self.path in files:
            self.ok(files[self.path])
        elif name in files and behaviour in BEHAVIOURS:
            BEHAVIOURS[behaviour](self, files[name])
        else:
            self.send_error(404)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def head(self, length: int | None) -> None:
        self.send_response(200)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()

    def ok(self, data: bytes) -> None:
        self.head(len(data))
        self.wfile.write(data)

    def slow(self, data: bytes) -> None:
        """Send all of it at the server's `slow_rate`."""
        self.head(len(data))
        piece = max(1, int(self.site.slow_rate / 20))
        for start in range(0, len(data), piece):
            if self.site.closing.wait(1 / 20):
                return
            self.wfile.write(data[start : start + piece])

    def trickle(self, data: bytes) -> None:
        """Send half at once, then 20 bytes per second: no time-out of a socket ever fires."""
        self.head(len(data))
        self.wfile.write(data[: len(data) // 2])
        for byte in data[len(data) // 2 :]:
            if self.site.closing.wait(1 / 20):
                return
            self.wfile.write(bytes([byte]))

    def trickle_head(self, data: bytes) -> None:
        """Send an endless header, 20 bytes per second."""
        self.wfile.write(b"HTTP/1.0 200 OK\r\nX-Never-Ending: ")
        while not self.site.closing.wait(1 / 20):
            self.wfile.write(b"x")

    def stall(self, data: bytes) -> None:
        """Send half, then nothing more."""
        self.head(len(data))
        self.wfile.write(data[: len(data) // 2])
        self.site.closing.wait()

    def silent(self, data: bytes) -> None:
        """Send not even a header."""
        self.site.closing.wait()

    def reset(self, data: bytes) -> None:
        """Reset the connection after half."""
        self.head(len(data))
        self.wfile.write(data[: len(data) // 2])
        # A linger time of 0 makes close() send a reset instead of an orderly end.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()  # which holds on to the connection
        self.connection.close()

    def truncated(self, data: bytes) -> None:
        """End after half of the announced length."""
        self.head(len(data))
        self.wfile.write(data[: len(data) // 2])

    def truncated_unsaid(self, data: bytes) -> None:
        """End after half, with no length announced."""
        self.head(None)
        self.wfile.write(data[: len(data) // 2])

    def overlong(self, data: bytes) -> None:
        """Send twice the announced length."""
        self.head(len(data))
        self.wfile.write(data * 2)

    def unsaid(self, data: bytes) -> None:
        """Send all of it, with no length announced."""
        self.head(None)
        self.wfile.write(data)

    def wrong(self, data: bytes) -> None:
        """Send other bytes of the same length."""
        self.ok(bytes(byte ^ 1 for byte in data))

    def missing(self, data: bytes) -> None:
        self.send_error(404)

    def once_500(self, data: bytes) -> None:
        """Fail the first time only."""
        if self.site.hits[self.path] == 1:
            self.send_error(500)
        else:
            self.ok(data)

    def loop(self, data: bytes) -> None:
        """Redirect to itself."""
        self.send_response(302)
        self.send_header("Location", self.path)
        self.end_headers()

    def to_a_file(self, data: bytes) -> None:
        """Redirect to a file of the client's machine."""
        self.send_response(302)
        self.send_header("Location", "file:///etc/passwd")
        self.end_headers()

    def bad_length(self, data: bytes) -> None:
        """Announce a length that is no number."""
        self.send_response(200)
        self.send_header("Content-Length", "many")
        self.end_headers()
        self.wfile.write(data)

    def endless(self, data: bytes) -> None:
        """Send without end, as fast as it is read."""
        self.head(None)
        while not self.site.closing.is_set():
            self.wfile.write(bytes(1 << 16))


BEHAVIOURS = {
    name: method
    for name, method in vars(Behaviours).items()
    if callable(method) and name not in ("do_GET", "log_message", "head")
}
