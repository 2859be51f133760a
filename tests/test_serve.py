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

from cifar_transfer import Classifier, TransferClassifier
from cifar_transfer.base.errors import UserError
from cifar_transfer.commands.serve import main
from cifar_transfer.inference import page

NAMES = ["<img src=x onerror=alert(1)>red", "蓝色", "green"]
SEND = {"Content-Type": page.KIND}


@pytest.fixture(scope="module")
def classifier():
    """A network that counts red, blue and green pixels."""
    model = TransferClassifier(
        "lenet5", "none", class_names=NAMES, normalize=[[0.0] * 3, [1.0] * 3]
    ).eval()
    colour = nn.Conv2d(3, 3, 1, bias=False)
    colour.weight.data = torch.tensor([[4.0, -2, -2], [-2, -2, 4], [-2, 4, -2]])[..., None, None]
    model.network = nn.Sequential(
        colour, nn.ReLU(), nn.AvgPool2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    model.geometry = replace(model.geometry, size=(32, 48))
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
    """Status, headers, and what is said."""
    with closing(http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=30)) as connection:
        connection.request(method, path, body, headers)
        reply = connection.getresponse()
        content = reply.read()
    return (
        reply.status,
        reply.headers,
        json.loads(content) if reply.headers["Content-Type"].endswith("json") else content,
    )


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
def test_the_answer_is_that_of_predict_for_the_file(server, classifier, tmp_path, content):
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
            r"The file cannot be decoded as an image \(Pillow knows no such image\): take another one\.",
        ),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", ".*Pillow knows no such image"),
        (IMAGES["png"][:-60], "The file cannot be decoded"),
        (png_of(100_000, 100_000), "The file has more than 100 million pixels: make it smaller"),
    ],
    ids=["empty", "SVG", "broken", "huge"],
)
def test_what_is_no_image_gets_a_sentence(server, content, sentence):
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
def test_requests_of_others_and_without_bounds_are_refused_before_they_are_read(
    server, method, path, headers, status
):
    """Nothing is sent after the headers, so that an answer means that nothing more was waited for."""
    with socket.create_connection(server.server_address, 30) as connection:
        lines = [f"{name}: {value}" for name, value in ({"Host": "127.0.0.1"} | headers).items()]
        connection.sendall("\r\n".join([f"{method} {path} HTTP/1.1", *lines, "", ""]).encode())
        head, _, body = b"".join(iter(lambda: connection.recv(65536), b"")).partition(b"\r\n\r\n")
    assert int(head.split()[1]) == status
    assert b"nosniff" in head
    assert bool(body) == (method != "HEAD")


def test_a_page_of_this_server_may_ask_it(server):
    own = {"Origin": server.url.rstrip("/")}
    assert ask(server, "POST", "/predict", IMAGES["png"], SEND | own)[0] == 200


def test_an_open_server_takes_any_name_but_no_other_origin(classifier, tmp_path):
    with serving(classifier, tmp_path / "run/checkpoints/best.ckpt", "0.0.0.0") as server:
        assert (
            ask(server, "GET", "/about", headers={"Host": "gpu7:80", "Origin": "http://gpu7:80"})[0]
            == 200
        )
        assert (
            ask(
                server,
                "GET",
                "/about",
                headers={"Host": "gpu7:80", "Origin": "http://evil.example"},
            )[0]
            == 403
        )


def test_nothing_but_the_pages_own_script_and_style_is_allowed(server):
    _, headers, content = ask(server, "GET", "/")
    rules = dict(rule.split(" ", 1) for rule in headers["Content-Security-Policy"].split("; "))
    assert rules["default-src"] == rules["frame-ancestors"] == "'none'"
    for tag in ("script", "style"):
        inline = content.split(f"<{tag}>".encode())[1].split(f"</{tag}>".encode())[0]
        assert (
            rules[f"{tag}-src"]
            == f"'sha256-{base64.b64encode(hashlib.sha256(inline).digest()).decode()}'"
        )
    assert not any(word in content for word in (b"http:", b"https:", b"innerHTML"))


def test_slow_clients_do_not_hold_others_up_and_are_cut_off(server, monkeypatch):
    begun = "POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: {}\r\nContent-Length: 9\r\n\r\nabc"
    slow = [socket.create_connection(server.server_address, 30) for _ in range(5)]
    for connection in slow:
        connection.sendall(begun.format(page.KIND).encode())
    assert ask(server, "POST", "/predict", IMAGES["png"])[0] == 200
    slow[0].shutdown(socket.SHUT_WR)
    assert b"400" in slow[0].recv(100)
    monkeypatch.setattr(page._Request, "timeout", None)  # so that nothing else ends a connection
    monkeypatch.setattr(page, "MOST_SECONDS", 0.1)
    with socket.create_connection(server.server_address, 30) as late:
        late.sendall(b"GET / HT")
        assert late.recv(100) == b""
    monkeypatch.setattr(page, "MOST_SECONDS", 60)
    for connection in slow:
        connection.close()
    places = 0
    while server.places.acquire(timeout=1):  # each that is left has been given back
        places += 1
    assert places == page.MOST_CONNECTIONS
    with socket.create_connection(server.server_address, 30) as one_more:
        assert one_more.recv(100) == b"", "all are taken"
    for _ in range(places):
        server.places.release()
    assert ask(server, "GET", "/")[0] == 200


def test_an_address_that_cannot_be_listened_at_is_a_sentence(server, classifier, tmp_path):
    taken = server.server_address[1]
    with pytest.raises(
        UserError, match=f"cannot be at port {taken} of 127.0.0.1 .* name another --port, or 0"
    ):
        page.Page(tmp_path, classifier, "127.0.0.1", taken)
    with pytest.raises(UserError, match="as --host a name or address of this machine"):
        page.Page(tmp_path, classifier, "nowhere.invalid", 0)
    with pytest.raises(UserError, match="port is 70000: take 0 to 65535"):
        main(["--port=70000"])
    with pytest.raises(
        UserError, match=r"cannot be at port 0 of a{64}.example \(no name\): name another --port"
    ):
        page.Page(tmp_path, classifier, f"{'a' * 64}.example", 0)


def test_the_command_takes_the_newest_run_and_its_images_and_ctrl_c_ends_it(
    run, monkeypatch, capfd
):
    said, about = io.StringIO(), {}

    def visit():
        try:
            while not (line := said.getvalue()).endswith("\n"):
                time.sleep(0.01)
            with urllib.request.urlopen(f"{line.split()[0]}about", timeout=30) as reply:
                about.update(json.load(reply))
        finally:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.chdir(run)
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # what runs in the background ignores it
    try:
        with redirect_stdout(said):
            threading.Thread(target=visit).start()
            main(["--port=0", "--accelerator=cpu"])
    finally:
        signal.signal(signal.SIGINT, before)
    assert "version_0/checkpoints/best.ckpt" in said.getvalue()
    assert about["network"] == "shufflenet_v2_x0_5"
    assert len(about["examples"]) > 2
    assert all(image.startswith("data:image/png;base64,") for _, image in about["examples"])
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
    if not (
        path := shutil.which("chromium")
        or shutil.which("chromium-browser")
        or shutil.which("google-chrome")
    ):
        pytest.skip("no Chromium is at hand")
    with library.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


def test_a_browser_shows_the_class_of_a_dropped_image_and_a_sentence_for_a_broken_one(
    chromium, server, monkeypatch
):
    shown, addresses, faults = chromium.new_page(), [], []
    shown.on("request", lambda request: addresses.append(request.url))
    shown.on("pageerror", lambda fault: faults.append(str(fault)))
    shown.on("dialog", lambda dialog: faults.append(dialog.message))

    def drop(name, content):
        shown.evaluate(DROP, [name, base64.b64encode(content).decode()])
        shown.wait_for_selector("body:not(.busy)")
        parts = ("name", "error", "classes", "none")
        return {
            part: shown.inner_text(f"#{part}") for part in parts if shown.is_visible(f"#{part}")
        }

    shown.goto(server.url)
    first = drop("<b>car</b>.png", IMAGES["png"])
    assert first["name"] == "<b>car</b>.png"
    assert first["classes"].startswith(NAMES[0]), "as text"
    assert first.keys() == {"name", "classes"}
    assert (
        shown.evaluate("document.querySelector('#classes div div').getBoundingClientRect().width")
        > 20
    )
    assert shown.evaluate("[seen.naturalWidth, seen.naturalHeight, heat.naturalWidth]") == [
        48,
        32,
        48,
    ]
    broken = drop("broken.png", IMAGES["png"][:-60])
    assert broken.keys() == {"name", "error"}
    assert broken["error"].startswith("The file cannot be decoded as an image")
    assert broken["error"].endswith("take another one.")

    def none(*_):
        raise UserError("There is no heat map of it.")

    monkeypatch.setattr(page, "heat_map", none)
    shown.locator("#examples button").first.click()
    shown.wait_for_selector("#result:not([hidden])")
    assert shown.inner_text("#none") == "There is no heat map of it."
    assert not shown.is_visible("#heat")
    assert faults == []
    assert {address.partition(":")[0] for address in addresses} <= {"http", "blob", "data"}
    assert all(address.startswith((server.url, "blob:", "data:")) for address in addresses)
