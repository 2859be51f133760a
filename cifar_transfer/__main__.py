"""All commands under one name, `cifar-transfer fit ...` or `python -m cifar_transfer fit ...`; alone, their list."""

import os
import sys

from cifar_transfer.base.errors import UserError, one_sentence
from cifar_transfer.cli import start


def main() -> None:
    """Run the command that the first argument names, or print the list of commands."""
    name, *args = sys.argv[1:] or ["--help"]
    if name in start.COMMANDS:
        start.run(name, args)
    with one_sentence():
        if name == "--version":
            print(start.version())
        elif (
            name == "--complete"
        ):  # bash: complete -o default -C "cifar-transfer --complete" cifar-transfer
            print("\n".join(start.completions(os.environ.get("COMP_LINE", ""))))
        elif name in ("-h", "--help"):
            print(start.list_text())
        else:
            near = start.near(name, start.COMMANDS)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(start.COMMANDS)}."
            raise UserError(f"There is no command {name}: {hint}")


if __name__ == "__main__":
    main()
