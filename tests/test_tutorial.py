"""The tutorial: the same in both languages, with outputs of a real run; it runs on shapes."""

import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BOOKS = {name: ROOT / "docs" / name for name in ("tutorial.ipynb", "tutorial.zh-CN.ipynb")}
MAGIC = re.compile(r"^( *)%(.*)", re.MULTILINE)
IMAGE = "image/png"
QUICKER = {
    'DATA = "cifar10"': 'DATA = "shapes"',
    "FROZEN, EPOCHS = 5, 15": "FROZEN, EPOCHS = 1, 2",
    "train_images=3000": "train_images=300",
}
# Another place than a folder below the current one: its name would be that of somebody's machine.
ABSOLUTE = re.compile(r"(?<![\w.])/\w+/|\b[A-Z]:\\")


def code(cells):
    return [cell for cell in cells if cell["cell_type"] == "code"]


def cells(name):
    return json.loads(BOOKS[name].read_text(encoding="utf-8"))["cells"]


def drawn(cells):
    return [
        any(IMAGE in output.get("data", ()) for output in cell["outputs"]) for cell in code(cells)
    ]


def said(cells):
    """What was printed."""
    return "".join(
        "".join(output.get("text", "")) for cell in code(cells) for output in cell["outputs"]
    )


def assert_the_best_have_a_star(cells):
    rows = re.findall(r"^ *\d+/\d+ .*% +[\d.]+ +([\d.]+)%( \*)?", said(cells), re.MULTILINE)
    assert len(rows) > 1
    for number, (accuracy, star) in enumerate(rows):
        assert bool(star) == all(float(accuracy) > float(before) for before, _ in rows[:number])


def form_and_words(cell):
    """The code with its texts left out, and the texts."""
    tree = ast.parse(
        MAGIC.sub(lambda line: f"{line[1]}magic({line[2]!r})", "".join(cell["source"]))
    )
    texts = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    words = [node.value for node in texts]
    for node in texts:
        node.value = ""
    return ast.dump(tree), words


def test_both_languages_have_the_same_code():
    english, chinese = map(cells, BOOKS)
    assert [cell["cell_type"] for cell in english] == [cell["cell_type"] for cell in chinese]
    for one, other in zip(code(english), code(chinese), strict=True):
        (form, words), (other_form, other_words) = form_and_words(one), form_and_words(other)
        assert form == other_form
        for word, translated in zip(words, other_words, strict=True):
            assert (
                word == translated
                or re.search("[一-龥]", translated)
                or (word, translated) == ("en", "zh")
            )


@pytest.mark.parametrize("name", BOOKS)
def test_the_outputs_kept_are_whole_and_of_no_machine(name):
    assert BOOKS[name].stat().st_size < 1.5e6
    kept = code(cells(name))
    assert [cell["execution_count"] for cell in kept] == list(range(1, len(kept) + 1)), (
        "run from top to bottom"
    )
    assert sum(drawn(kept)) >= 10
    assert_the_best_have_a_star(kept)
    for output in (output for cell in kept for output in cell["outputs"]):
        assert output["output_type"] != "error"
        assert output.get("name") != "stderr"
        shown = json.dumps(
            {key: value for key, value in output.get("data", output).items() if key != IMAGE}
        )
        assert not ABSOLUTE.search(shown), shown


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param("tutorial.ipynb", marks=pytest.mark.whole), "tutorial.zh-CN.ipynb"]
)
def test_it_runs_on_drawn_shapes(name, tmp_path, monkeypatch):
    nbclient = pytest.importorskip(
        "nbclient", reason="nbclient runs the notebooks and is of the test extra"
    )
    pytest.importorskip(
        "ipykernel", reason="ipykernel runs the notebooks' code and is of the test extra"
    )
    import nbformat

    for place in ("JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(place, str(tmp_path / place))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    book = nbformat.read(BOOKS[name], as_version=4)
    for setting, quicker in QUICKER.items():
        (cell,) = (cell for cell in book.cells if setting in cell.source)
        cell.source = cell.source.replace(setting, quicker)
    nbclient.NotebookClient(
        book, timeout=300, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    assert drawn(book.cells) == drawn(cells(name))
    assert_the_best_have_a_star(book.cells)
    warned = [
        output.text
        for cell in code(book.cells)
        for output in cell.outputs
        if output.get("name") == "stderr"
    ]
    assert re.fullmatch("(Figures are in English: no font here .*\n)?", "".join(warned))
