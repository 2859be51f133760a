"""A line on the terminal that says how far something is, and is replaced by the next one."""

import re
import shutil
import sys
import time

from cifar_transfer.base.text import STYLE

SECONDS_BETWEEN_LINES = 60  # where there is no terminal, whose lines stay


class StatusLine:
    """Show one line after another in the same place of a terminal.

    Where standard output is no terminal, a line a minute is printed, if it is another one.
    """

    def __init__(self) -> None:
        self._shown = ""
        self._last_time = time.monotonic()

    def show(self, text: str) -> None:
        """Show a text in place of the one before."""
        text = re.sub(STYLE, "", text)
        if text == self._shown:
            return
        if sys.stdout.isatty():
            columns = shutil.get_terminal_size().columns - 1  # some break a line that fills it
            print(f"\r{text[:columns]:<{columns}}", end="", flush=True)
            self._shown = text
        elif time.monotonic() - self._last_time >= SECONDS_BETWEEN_LINES:
            print(text, flush=True)
            self._shown = text
            self._last_time = time.monotonic()

    def clear(self) -> None:
        """Make place for a line that stays."""
        if self._shown and sys.stdout.isatty():
            columns = shutil.get_terminal_size().columns - 1
            print(f"\r{'':<{columns}}\r", end="", flush=True)
        self._shown = ""
        self._last_time = time.monotonic()
