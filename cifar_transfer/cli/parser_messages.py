"""Messages of jsonargparse in one line of plain words.

jsonargparse gives no structured account of what is wrong, so this goes by the words of its
messages. `tests/test_cli.py` fails where they change.
"""

import re

# Lines that describe jsonargparse's search, and not the mistake.
SEARCH_LINES = (
    "Does not validate against any",
    "Subtypes:",
    "Errors:",
    "Given value type:",
    "Given value: Namespace(",
    "Given value: NestedArg(",
)
PLAIN_WORDS = {
    r'Parser key "([^"]+)": (?=Expected a (?:<|typing))': r"--\1 takes ",
    r"Expected an? <class '(\w+)'>": r"\1",
    r"Expected a typing\.Literal\[([^\]]*)\]": r"\1",
    r"[;.] (Got|Given) value: ": ", not ",
    r"\bNoneType\b": "null",
    r"; null\b": " or null",
    r'Parser key "(\w+)": (\w+) takes ': r"--\1.\2 takes ",
}


def plain_message(message: str) -> str:
    """Return a message of jsonargparse in one line.

    For a value that may have several types, jsonargparse lists an error for each type. An error
    that says more than "Expected a <type>" is the cause, and the others are left out.
    """
    lines = []
    for line in message.splitlines():
        text = line.strip(" -")
        if text and text not in lines and not text.startswith(SEARCH_LINES):
            lines.append(text)
    causes = [line for line in lines if not line.startswith(("Expected a", "Given value"))]
    if not all(line.startswith("Parser key") for line in causes):
        lines = causes
    text = "; ".join(lines).replace(":; ", ": ")
    for pattern, words in PLAIN_WORDS.items():
        text = re.sub(pattern, words, text)
    if re.match(r"--\S+ takes ", text):
        text = text.replace("; ", ", ")
    return text


def unknown_option(message: str) -> str | None:
    """Return the option that jsonargparse does not know by an error message, "--model.lx", or None.

    Since jsonargparse 4.35.
    """
    prefix = "unrecognized arguments: "
    if not message.startswith(prefix + "--"):
        return None
    return message.removeprefix(prefix).partition("=")[0]


def unknown_key(message: str) -> str | None:
    """Return the key that jsonargparse does not know within a class or a file of options, or None.

    Since jsonargparse 4.52.
    """
    match = re.search(r"[Oo]ption '([^']+)'", message)
    return match and match[1]


def unknown_argument(message: str) -> str | None:
    """Return the first argument that jsonargparse knows as no option's value, or None.

    Since jsonargparse 4.35.
    """
    prefix = "unrecognized arguments: "
    if not message.startswith(prefix) or message.startswith(prefix + "-"):
        return None
    return message.removeprefix(prefix)


def group_with_a_value(message: str) -> tuple[str, str] | None:
    """Return a group, "model", and the value in its place, by a message of jsonargparse, or None.

    Since jsonargparse 4.35.
    """
    match = re.match(r"""Parser key "(\w+)": Unable to load config ['"]([^'"]*)['"]""", message)
    return match and (match[1], match[2])


def is_import_refusal(message: str) -> bool:
    """Return whether jsonargparse says that a class is not on the list of what may be imported.

    Since jsonargparse 4.52.
    """
    return "is not allowed" in message


def unknown_class(message: str, key: str) -> str | None:
    """Return the value of an option that names no class, by a message of jsonargparse, or None.

    Since jsonargparse 4.35.
    """
    if f'key "{key}"' not in message:
        return None
    match = re.search(r"import path string: ([^;\s]*)", message)
    return match and match[1]
