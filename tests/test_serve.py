"""The page that classifies images, as its server answers and as Chromium shows it."""

import base64
import hashlib
import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import threading
import time
import urllib.request
from contextlib import closing, contextmanager, redirect_stdout
from dataclasses import replace
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from conftest import RUN
from PIL import Image
from test_bad_images import encoded, png_of
from torch import nn

from cifar_transfer import Classifier
from cifar_transfer.base.errors import UserError
from cifar_transfer.commands.serve import main
from cifar_transfer.inference import page
from cifar_transfer.network.image_classifier import ImageClassifier, NetworkOptions

NAMES = ["<img src=x onerror=alert(1)>red", "蓝色", "green"]
SEND = {"Content-Type": page.CONTENT_TYPE}


@pytest.fixture(scope="module")
def classifier():
    """A network that counts red, blue and green pixels."""
    statistics = [[0.0] * 3, [1.0] * 3]
    options = NetworkOptions("lenet5", "none", class_names=NAMES, normalize=statistics)
    model = ImageClassifier(options)
    colour = nn.Conv2d(3, 3, 1, bias=False)
    colour.weight.data = torch.tensor([[4.0, -2, -2], [-2, -2, 4], [-2, 4, -2]])[..., None, None]
    model.network = nn.Sequential(
        colour, nn.ReLU(), nn.AvgPool2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    model.set_geometry(replace(model.geometry, size=(32, 48)))
    return Classifier(model, "cpu")


@contextmanager
def serving(classifier, ckpt, host="127.0.0.1"):
    with page.Page(ckpt, classifier, host, 0) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()


@pytest.fixture(scope="module")
def server(classifier, run):
    with serving(classifier, run / RUN / "checkpoints/best.ckpt") as server:
        yield server


def ask(server, method, path, body=None, headers=SEND):
    """Send a request, and return the status, the headers and the content of the reply."""
    with closing(http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=30)) as connection:
        connection.request(method, path, body, headers)
        reply = connection.getresponse()
        content = reply.read()
    if reply.headers["Content-Type"].endswith("json"):
        content = json.loads(content)
    return reply.status, reply.headers, content


def red(size=(60, 40)):
    pixels = np.full((*size[::-1], 3), 90, np.uint8)
    pixels[: size[1] // 2, : size[0] // 2] = (250, 20, 10)
    return Image.fromarray(pixels)


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(red(), "JPEG", exif=exif)


IMAGES = {
    "png": encoded(red(), "PNG"),
    "turned.jpg": turned(),
    "cmyk.jpg": encoded(red().convert("CMYK"), "JPEG"),
    "grey.tif": encoded(red().convert("I;16"), "TIFF"),
    "animated.gif": encoded(
        red(), "GIF", save_all=True, append_images=[red().transpose(Image.Transpose.ROTATE_90)]
    ),
}


@pytest.mark.parametrize("content", IMAGES.values(), ids=IMAGES)
def test_the_page_gives_the_classes_that_predict_gives(server, classifier, tmp_path, content):
    (tmp_path / "image").write_bytes(content)
    status, _, answer = ask(server, "POST", "/predict", content)
    assert status == 200
    assert [tuple(row) for row in answer["classes"]] == classifier.predict(tmp_path / "image")
    assert {"heat", "no_heat"} & answer.keys()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (
            b"",
            r"The file cannot be decoded as an image \(Pillow knows no such image\): "
            r"take another one\.",
        ),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", ".*Pillow knows no such image"),
        (IMAGES["png"][:-60], "The file cannot be decoded"),
        (png_of(100_000, 100_000), "The file has more than 100 million pixels: make it smaller"),
    ],
    ids=["empty", "SVG", "broken", "huge"],
)
def test_a_file_that_is_no_image_gets_a_sentence(server, content, sentence):
    status, _, answer = ask(server, "POST", "/predict", content)
    assert status == 400
    assert re.match(sentence, answer["error"])
    assert answer.keys() == {"error"}


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/", {"Host": "localhost:1"}, 200),
        ("GET", "/", {"Host": "[::1]:1"}, 200),
        ("GET", "/", {"Host": "evil.example:7860"}, 403),
        ("GET", "/", {"Host": "127.0.0.1.evil.example"}, 403),
        ("GET", "/", {"Host": "[::1"}, 403),
        ("GET", "/about", {"Origin": "https://evil.example"}, 403),
        ("GET", "/about", {"Origin": "null"}, 403),
        ("GET", "/../serve.py", {}, 404),
        ("HEAD", "/", {}, 501),
        ("PUT", "/predict", {}, 501),
        ("OPTIONS", "/predict", {}, 501),
        ("POST", "/predict", {"Host": "evil.example", **SEND, "Content-Length": "9"}, 403),
        ("POST", "/predict", {"Origin": "http://127.0.0.1:1", **SEND, "Content-Length": "9"}, 403),
        ("POST", "/predict", {"Content-Type": "text/plain", "Content-Length": "9"}, 415),
        ("POST", "/predict", {**SEND, "Content-Length": "9" * 12}, 413),
        ("POST", "/predict", {**SEND, "Content-Length": "9" * 5000}, 411),
        ("POST", "/predict", {**SEND, "Content-Length": "-1"}, 411),
        ("POST", "/predict", {**SEND, "Transfer-Encoding": "chunked"}, 411),
    ],
)
def test_a_request_of_another_site_or_without_bounds_is_refused_before_it_is_read(
    server, method, path, headers, status
):
    """Nothing is sent after the headers, so a reply means that the server waited for no more."""
    lines = [f"{method} {path} HTTP/1.1"]
    for name, value in ({"Host": "127.0.0.1"} | headers).items():
        lines.append(f"{name}: {value}")
    with socket.create_connection(server.server_address, 30) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        reply = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, body = reply.partition(b"\r\n\r\n")
    assert int(head.split()[1]) == status
    assert b"nosniff" in head
    assert bool(body) == (method != "HEAD")


def test_a_page_of_this_server_may_ask_it(server):
    own = {"Origin": server.url.rstrip("/")}
    assert ask(server, "POST", "/predict", IMAGES["png"], SEND | own)[0] == 200


def test_a_server_that_others_can_reach_has_any_name_but_refuses_another_origin(
    classifier, tmp_path
):
    with serving(classifier, tmp_path / "run/checkpoints/best.ckpt", "0.0.0.0") as server:
        same_origin = {"Host": "gpu7:80", "Origin": "http://gpu7:80"}
        assert ask(server, "GET", "/about", headers=same_origin)[0] == 200
        other_origin = {"Host": "gpu7:80", "Origin": "http://evil.example"}
        assert ask(server, "GET", "/about", headers=other_origin)[0] == 403


def test_a_browser_may_use_nothing_but_the_pages_own_script_and_style(server):
    _, headers, content = ask(server, "GET", "/")
    rules = dict(rule.split(" ", 1) for rule in headers["Content-Security-Policy"].split("; "))
    assert rules["default-src"] == "'none'"
    assert rules["frame-ancestors"] == "'none'"
    for tag in ("script", "style"):
        inline = content.split(f"<{tag}>".encode())[1].split(f"</{tag}>".encode())[0]
        digest = base64.b64encode(hashlib.sha256(inline).digest()).decode()
        assert rules[f"{tag}-src"] == f"'sha256-{digest}'"
    for word in (b"http:", b"https:", b"innerHTML"):
        assert word not in content


UNFINISHED = (
    "POST /predict HTTP/1.1\r\n"
    "Host: localhost\r\n"
    f"Content-Type: {page.CONTENT_TYPE}\r\n"
    "Content-Length: 9\r\n"
    "\r\n"
    "abc"
)


def free_places(server):
    """Take all places for connections that are free, and return how many there were."""
    places = 0
    while server.places.acquire(timeout=1):
        places += 1
    return places


def test_slow_clients_do_not_hold_others_up(server):
    slow = [socket.create_connection(server.server_address, 30) for _ in range(5)]
    for connection in slow:
        connection.sendall(UNFINISHED.encode())
    assert ask(server, "POST", "/predict", IMAGES["png"])[0] == 200
    slow[0].shutdown(socket.SHUT_WR)
    assert b"400" in slow[0].recv(100)
    for connection in slow:
        connection.close()


def test_a_connection_is_cut_off_after_a_time(server, monkeypatch):
    monkeypatch.setattr(page._Request, "timeout", None)  # so that nothing else ends a connection
    monkeypatch.setattr(page, "MAX_CONNECTION_SECONDS", 0.1)
    with socket.create_connection(server.server_address, 30) as late:
        late.sendall(b"GET / HT")
        assert late.recv(100) == b""


def test_one_connection_too_many_is_refused(server):
    places = free_places(server)
    assert places == page.MAX_CONNECTIONS, "earlier connections have left their places"
    with socket.create_connection(server.server_address, 30) as one_more:
        assert one_more.recv(100) == b""
    for _ in range(places):
        server.places.release()
    assert ask(server, "GET", "/")[0] == 200


@pytest.mark.parametrize(
    ("host", "message"),
    [
        ("nowhere.invalid", "as --host a name or address of this machine"),
        (f"{'a' * 64}.example", r"cannot be at port 0 of a{64}.example \(no name\): name another"),
    ],
    ids=["unknown", "too long"],
)
def test_a_host_that_it_cannot_listen_at_is_an_error(classifier, tmp_path, host, message):
    with pytest.raises(UserError, match=message):
        page.Page(tmp_path, classifier, host, 0)


def test_a_port_that_is_taken_is_an_error(server, classifier, tmp_path):
    taken = server.server_address[1]
    message = f"cannot be at port {taken} of 127.0.0.1 .* name another --port, or 0"
    with pytest.raises(UserError, match=message):
        page.Page(tmp_path, classifier, "127.0.0.1", taken)
    with pytest.raises(UserError, match="port is 70000: take 0 to 65535"):
        main(["--port=70000"])


def test_the_command_serves_the_newest_run_until_ctrl_c(run, monkeypatch, capfd):
    printed = io.StringIO()
    about = {}

    def visit():
        try:
            while not printed.getvalue().endswith("\n"):
                time.sleep(0.01)
            url = printed.getvalue().split()[0]
            with urllib.request.urlopen(f"{url}about", timeout=30) as reply:
                about.update(json.load(reply))
        finally:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.chdir(run)
    # A process in the background may ignore the signal.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with redirect_stdout(printed):
            threading.Thread(target=visit).start()
            main(["--port=0", "--accelerator=cpu"])
    finally:
        signal.signal(signal.SIGINT, handler)
    assert "version_0/checkpoints/best.ckpt" in printed.getvalue()
    assert about["network"] == "shufflenet_v2_x0_5"
    assert len(about["examples"]) > 2
    for _, image in about["examples"]:
        assert image.startswith("data:image/png;base64,")
    assert capfd.readouterr() == ("", "")


DROP = """([name, content]) => {
  const moved = new DataTransfer();
  moved.items.add(new File([Uint8Array.from(atob(content), c => c.charCodeAt(0))], name));
  const drop = new DragEvent("drop", {dataTransfer: moved, bubbles: true, cancelable: true});
  document.querySelector("label").dispatchEvent(drop);
}"""


@pytest.fixture(scope="module")
def chromium():
    library = pytest.importorskip(
        "playwright.sync_api", reason="playwright, which drives Chromium, is not installed"
    )
    paths = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")]
    paths = [path for path in paths if path]
    if not paths:
        pytest.skip("no Chromium is at hand")
    with library.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=paths[0], args=["--no-sandbox"])
        yield browser
        browser.close()


class Visit:
    """The page in a browser, and what it asks for and complains about."""

    def __init__(self, browser, server):
        self.tab = browser.new_page()
        self.addresses = []
        self.faults = []
        self.tab.on("request", lambda request: self.addresses.append(request.url))
        self.tab.on("pageerror", lambda fault: self.faults.append(str(fault)))
        self.tab.on("dialog", lambda dialog: self.faults.append(dialog.message))
        self.tab.goto(server.url)

    def drop(self, name, content):
        """Drop a file, and return the parts of the page that are then visible."""
        self.tab.evaluate(DROP, [name, base64.b64encode(content).decode()])
        self.tab.wait_for_selector("body:not(.busy)")
        visible = {}
        for part in ("name", "error", "classes", "none"):
            if self.tab.is_visible(f"#{part}"):
                visible[part] = self.tab.inner_text(f"#{part}")
        return visible


@pytest.fixture
def visit(chromium, server):
    visit = Visit(chromium, server)
    yield visit
    assert visit.faults == []
    for address in visit.addresses:
        assert address.startswith((server.url, "blob:", "data:"))


def test_a_browser_shows_the_class_of_a_dropped_image(visit):
    visible = visit.drop("<b>car</b>.png", IMAGES["png"])
    assert visible.keys() == {"name", "classes"}
    assert visible["name"] == "<b>car</b>.png"
    assert visible["classes"].startswith(NAMES[0]), "as text"
    first_bar = "document.querySelector('#classes div div')"
    assert visit.tab.evaluate(f"{first_bar}.getBoundingClientRect().width") > 20
    sizes = visit.tab.evaluate("[seen.naturalWidth, seen.naturalHeight, heat.naturalWidth]")
    assert sizes == [48, 32, 48]


def test_a_browser_shows_a_sentence_for_a_broken_image(visit):
    visible = visit.drop("broken.png", IMAGES["png"][:-60])
    assert visible.keys() == {"name", "error"}
    assert visible["error"].startswith("The file cannot be decoded as an image")
    assert visible["error"].endswith("take another one.")


def test_a_browser_shows_why_an_example_has_no_heat_map(visit, monkeypatch):
    def heat_map(*_):
        raise UserError("There is no heat map of it.")

    monkeypatch.setattr(page, "heat_map", heat_map)
    visit.tab.locator("#examples button").first.click()
    visit.tab.wait_for_selector("#result:not([hidden])")
    assert visit.tab.inner_text("#none") == "There is no heat map of it."
    assert not visit.tab.is_visible("#heat")
