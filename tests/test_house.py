"""What holds for every file of the project."""

import ast
from pathlib import Path

import pytest

import cifar_transfer

TESTS = sorted(Path(__file__).parent.glob("*.py"))
PACKAGE = Path(cifar_transfer.__file__).parent
INTERNALS = PACKAGE / "training" / "lightning_internals.py"
OWN = ("self", "cls", "super()")
PUBLIC = {"_asdict", "_replace", "_exit"}  # documented in spite of their names


def private_names_of_others(tree):
    """Return the private names of a module that are neither of `self` nor of this package."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in OWN:
            names.append(node.attr)
        elif isinstance(node, ast.ImportFrom) and not node.module.startswith("cifar_transfer"):
            names += [*node.module.split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr"):
            names.append(str(getattr(node.args[1], "value", "")))
    private = {name for name in names if name.startswith("_") and not name.startswith("__")}
    return private - PUBLIC


def test_one_file_touches_what_libraries_keep_to_themselves():
    touching = set()
    for path in PACKAGE.rglob("*.py"):
        if private_names_of_others(ast.parse(path.read_text())):
            touching.add(path)
    assert touching == {INTERNALS}


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.name)
def test_each_expected_error_is_told_from_others(path):
    for call in ast.walk(ast.parse(path.read_text())):
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "pytest.raises":
            assert "match" in {keyword.arg for keyword in call.keywords}, f"{path}:{call.lineno}"
