"""Options whose values are text whatever characters they have, such as the name of a folder.

jsonargparse reads a value as YAML, and refuses 1e5, [a], null or "a: b" where it wants text. So it
is given another text in their place, and the values are put in once the options are parsed.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from jsonargparse import set_dumper

# Each with its key in the parsed options, and whether null means that the option is left out.
TEXT_OPTIONS = {
    "--data.root": ("data.init_args.root", False),
    "--data.group": ("data.init_args.group", True),
}


def without_texts(args: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return options in which texts are replaced, and the texts by what replaces them.

    Args:
        args: Options of the command line.
    """
    options: list[str] = []
    texts: dict[str, str] = {}
    index = 0
    while index < len(args):
        name, equals, value = args[index].partition("=")
        argument_count = 1
        if name in TEXT_OPTIONS and not equals and index + 1 < len(args):
            value = args[index + 1]
            argument_count = 2
        if _is_text(name, value, bool(equals) or argument_count == 2):
            replacement = f"text-{len(texts)}"
            texts[replacement] = value
            options.append(f"{name}={replacement}")
        else:
            options += args[index : index + argument_count]
        index += argument_count
    return options, texts


def _is_text(name: str, value: str, has_value: bool) -> bool:
    """Return whether an option has a text for its value, and not null for none."""
    if name not in TEXT_OPTIONS or not has_value:
        return False
    _, may_be_null = TEXT_OPTIONS[name]
    return value != "null" or not may_be_null


def put_in(config: Any, texts: Mapping[str, str]) -> None:
    """Put texts into parsed options, in place of what has replaced them."""
    for key, _ in TEXT_OPTIONS.values():
        replacement = config.get(key)
        if replacement in texts:
            config[key] = texts[replacement]


class TextDumper(yaml.SafeDumper):
    """Writes YAML with quotes around texts such as 1e5, which jsonargparse reads as numbers."""


TextDumper.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"),
    list("-+0123456789"),
)


def _dump(options: Any) -> str:
    """Return options as YAML, as jsonargparse has it but for these quotes."""
    return yaml.dump(
        options, Dumper=TextDumper, default_flow_style=False, allow_unicode=True, sort_keys=False
    )


set_dumper("yaml", _dump)
