"""Recipes: named files of options, and the options that a folder of results was made with."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cifar_transfer.base.errors import UserError
from cifar_transfer.base.files import CONFIG, user_path
from cifar_transfer.base.text import without_password

RECIPE_FILE = "recipe.json"  # in a folder of results: the options that they were made with
_PACKAGE = Path(__file__).parents[1]
RECIPES = _PACKAGE / "configs"  # where the package is installed
if not RECIPES.is_dir():
    RECIPES = _PACKAGE.parent / "configs"  # in a checkout


def with_recipe_files(args: Sequence[str]) -> list[str]:
    """Return options in which `--config fast` names the file of that recipe.

    Raises:
        UserError: A name is neither that of a file nor that of a recipe.
    """
    options = []
    name_follows = False
    for arg in args:
        if name_follows:
            options.append(_recipe_file(arg))
        elif arg.startswith("--config="):
            options.append(f"--config={_recipe_file(arg.removeprefix('--config='))}")
        else:
            options.append(arg)
        name_follows = arg in ("--config", "-c")
    return options


def with_recipe_names(args: Sequence[str]) -> list[str]:
    """Return options in which each recipe of this package has its name again, as `--config fast`.

    What is kept of a command is then no matter of where the package is installed.

    Args:
        args: Options as of `with_recipe_files`.
    """
    names = {str(path): path.stem for path in RECIPES.glob("*.yaml")}
    options = []
    for arg in args:
        option, _, file = arg.partition("=")
        if option == "--config" and file in names:
            options.append(f"--config={names[file]}")
        else:
            options.append(names.get(arg, arg))
    return options


def _recipe_file(name: str) -> str:
    is_yaml = "{" in name or ":" in name  # options themselves, which jsonargparse takes too
    files = {path.stem: str(path) for path in sorted(RECIPES.glob("*.yaml"))}
    path = user_path(name)
    if path.is_dir() and name in files:  # the images may be in a folder `photos`
        return files[name]
    if path.is_dir():
        raise UserError(f"--config {name} is a folder: name a file of options, or a recipe.")
    if path.exists():
        return str(path)
    if is_yaml:
        return name
    if name not in files:
        names = ", ".join(files)
        raise UserError(f"--config {name} is neither a file nor a recipe: the recipes are {names}.")
    return files[name]


def check_recipe(folder: Path, options: Sequence[str]) -> dict[str, Any]:
    """Return the contents of the `recipe.json` of a folder: the options, and their files' lines.

    Args:
        folder: A folder of results, which need not exist yet.
        options: Options of `fit`. Passwords in them are left out.

    Raises:
        UserError: The folder holds results that were made with other options, or is that of a run.
    """
    if (folder / CONFIG).is_file():
        raise UserError(f"{folder} is the folder of a run: name another folder with --out.")
    names = with_recipe_names(options)
    recipe: dict[str, Any] = {"options": [without_password(option) for option in names]}
    for option in options:
        if option.startswith("--config="):
            lines = recipe.setdefault("config", [])
            file = Path(option.removeprefix("--config="))
            if file.is_file():
                lines += file.read_text().splitlines()
    if _has_another_recipe(folder / RECIPE_FILE, recipe):
        raise UserError(
            f"{folder} holds results of another recipe ({RECIPE_FILE}): "
            "name another folder with --out."
        )
    return recipe


def _has_another_recipe(path: Path, recipe: dict[str, Any]) -> bool:
    if not path.is_file():
        return False
    try:
        return json.loads(path.read_text()) != recipe
    except ValueError:  # somebody else's file
        return True
