"""What holds for every file of the project."""

import ast
from pathlib import Path

import pytest

TESTS = sorted(Path(__file__).parent.glob("*.py"))


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.name)
def test_each_expected_error_is_told_from_others(path):
    for call in ast.walk(ast.parse(path.read_text())):
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "pytest.raises":
            assert "match" in {keyword.arg for keyword in call.keywords}, f"{path}:{call.lineno}"
