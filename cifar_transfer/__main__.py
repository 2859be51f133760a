"""The list of commands: `python -m cifar_transfer`."""

import ast
import signal
from pathlib import Path

COMMANDS = ("fit", "evaluate", "predict", "export", "compare", "backbones", "figures", "serve", "demo")


def main() -> None:
    """Print each command with the first line of its docstring, which is read without importing it."""
    for command in COMMANDS:
        text = ast.get_docstring(ast.parse(Path(__file__).with_name(f"{command}.py").read_text())) or ""
        print(f"python -m cifar_transfer.{command:<10} {text.splitlines()[0].split(': `python')[0].rstrip('.')}")


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # whoever reads may stop, as `head` does
    main()
