"""All commands under one name: `cifar-transfer COMMAND`, or `python -m cifar_transfer COMMAND`."""

import os
import sys

from cifar_transfer.base.errors import UserError, one_sentence
from cifar_transfer.cli import spelling, start


def main() -> None:
    """Run the command that the first argument names, or print the list of commands."""
    arguments = sys.argv[1:]
    if not arguments:
        arguments = ["--help"]
    name = arguments[0]
    if name in start.COMMANDS:
        start.run(name, arguments[1:])
    with one_sentence():
        if name in ("-h", "--help"):
            print(start.list_text())
        elif name == "--version":
            print(start.version())
        elif name == "--complete":
            # In bash: complete -o default -C "cifar-transfer --complete" cifar-transfer
            print("\n".join(start.completions(os.environ.get("COMP_LINE", ""))))
        else:
            raise _unknown_command(name)


def _unknown_command(name: str) -> UserError:
    hints = spelling.similar(name, start.COMMANDS)
    if hints:
        return UserError(f"There is no command {name}: did you mean {hints[0]}?")
    return UserError(f"There is no command {name}: there are {', '.join(start.COMMANDS)}.")


if __name__ == "__main__":
    main()
