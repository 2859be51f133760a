"""Errors that a user can mend: shown as one sentence, without a traceback."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch.utilities.exceptions import MisconfigurationException


class UserError(Exception):
    """What was wrong, where, and what to do about it, in a sentence or two."""

    def __str__(self) -> str:
        # A DataLoader raises a worker's error anew with the worker's traceback as its message; only our words matter.
        return super().__str__().rsplit("UserError: ", 1)[-1].strip()


@contextmanager
def one_sentence() -> Iterator[None]:
    """Turn a `UserError` (or Lightning's own word on a wrong setting) into a line on stderr and exit status 2."""
    try:
        yield
    except (UserError, MisconfigurationException) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)
