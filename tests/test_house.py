"""What holds for every file of the project."""

import ast
import tokenize
from pathlib import Path

import pytest

import cifar_transfer

TESTS = sorted(Path(__file__).parent.glob("*.py"))
PACKAGE = sorted(Path(cifar_transfer.__file__).parent.rglob("*.py"))
LONGEST = 300  # lines of a file in the package
MOST_CODE = 7500  # lines of the whole package: whoever adds a feature finds one that does not earn its lines
NO_CODE = {
    getattr(tokenize, name)
    for name in ("COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENCODING", "ENDMARKER")
}


def test_no_file_is_long():
    assert len({path.parent for path in PACKAGE}) > 5, "the rooms too"
    lines = {path.name: len(path.read_text().splitlines()) for path in PACKAGE}
    assert {name: count for name, count in lines.items() if count > LONGEST} == {}


def code_lines(path):
    """Lines that are neither blank nor a comment nor of a docstring."""
    with path.open("rb") as file:
        code = [token for token in tokenize.tokenize(file.readline) if token.type not in NO_CODE]
    lines = {line for token in code for line in range(token.start[0], token.end[0] + 1)}
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            lines -= {*range(node.body[0].lineno, node.body[0].end_lineno + 1)}
    return lines


def test_the_package_has_not_more_code_than_its_budget(tmp_path):
    path = tmp_path / "some.py"
    path.write_text(
        '"""Doc."""\n\n# why\nx = """a\nb"""  # note\n\n\ndef f():\n    """Two\n    lines."""\n    return x\n'
    )
    assert code_lines(path) == {4, 5, 8, 11}
    assert sum(len(code_lines(path)) for path in PACKAGE) <= MOST_CODE


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.name)
def test_each_expected_error_is_told_from_others(path):
    for call in ast.walk(ast.parse(path.read_text())):
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "pytest.raises":
            assert "match" in {keyword.arg for keyword in call.keywords}, f"{path}:{call.lineno}"
