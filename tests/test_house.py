"""What holds for every file of the project."""

import ast
from pathlib import Path

import pytest

import cifar_transfer

TESTS = sorted(Path(__file__).parent.glob("*.py"))
PACKAGE = sorted(Path(cifar_transfer.__file__).parent.rglob("*.py"))
LONGEST = 300  # lines of a file in the package


def test_no_file_is_long():
    assert len({path.parent for path in PACKAGE}) > 5, "the rooms too"
    lines = {path.name: len(path.read_text().splitlines()) for path in PACKAGE}
    assert {name: count for name, count in lines.items() if count > LONGEST} == {}


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.name)
def test_each_expected_error_is_told_from_others(path):
    for call in ast.walk(ast.parse(path.read_text())):
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "pytest.raises":
            assert "match" in {keyword.arg for keyword in call.keywords}, f"{path}:{call.lineno}"
