"""Errors that a user can mend: shown as one sentence, without a traceback."""

import errno
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from cifar_transfer.console import printable

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


class UserError(Exception):
    """What was wrong, where, and what to do about it, in a sentence or two."""

    def __str__(self) -> str:
        # A DataLoader raises a worker's error anew with the worker's traceback as its message; only our words matter.
        return printable(super().__str__().rsplit("UserError: ", 1)[-1].strip())


def check(name: str, value: Any, fits: Callable[[Any], object], wanted: str) -> None:
    """Refuse an option's value.

    Args:
        name: Of the option.
        value: As given; a flag is no number, and what is no number at all, as null, fits nowhere.
        fits: Whether a number is in the range.
        wanted: The end of the sentence, "take ...".

    Raises:
        UserError: It does not fit.
    """
    try:
        if not isinstance(value, bool) and fits(value):
            return
    except (TypeError, OverflowError):  # from comparing with numbers what is none, or beyond them
        pass
    raise UserError(f"{name} is {'null' if value is None else value}: take {wanted}.")


def taken(account: str, given: str) -> str:
    """What an option takes, from jsonargparse's account of each type that its value could have had and has not.

    Args:
        account: Its message up to the value.
        given: The value.
    """
    keys = dict.fromkeys(re.findall(r'Parser key "(.*?)"', account))
    words = {"int": "a whole number", "float": "a number", "str": "text", "bool": "true or false", "NoneType": "null"}
    types = [found.strip(" .") for found in re.findall(r"Expected an? (.*)", account)]
    wanted = [re.sub(r"<class '(.*)'>", lambda kind: words.get(kind[1], kind[1]), found) for found in types]
    wanted = [re.sub(r"typing\.Literal\[(.*)\]", r"\1", found) for found in wanted]
    return f"{'.'.join(keys)} is {given}: take {', or '.join(dict.fromkeys(wanted))}."


def first_line(error: BaseException) -> str:
    """What an error of somebody else's says, in a line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def one_sentence() -> Iterator[None]:
    """Turn a `UserError` into a line on stderr and exit status 2, and so Lightning's own word on a wrong setting.

    That comes in several classes, and is known by where it is raised. A full disk is the user's to mend likewise. A
    signal ends with the shell's status for it, 130 or 143.
    """
    try:
        yield
    except (UserError, MisconfigurationException, ValueError, TypeError) as error:
        *_, (last, _) = traceback.walk_tb(error.__traceback__)
        ours = isinstance(error, UserError | MisconfigurationException)
        if not ours and not last.f_globals.get("__name__", "").startswith("lightning."):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        print(f"error: {error.filename or 'A file'} cannot be written ({error.strerror}): make room.", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        _end("Interrupted.", signal.SIGINT)
    except SIGTERMException:
        _end("Terminated.", signal.SIGTERM)
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt) and error.code == 1:  # Lightning's, who ends with 1
            _end("Interrupted.", signal.SIGINT)
        raise


def _end(word: str, number: signal.Signals) -> NoReturn:
    print(word, file=sys.stderr)
    sys.exit(128 + number)
