"""Errors that a user can mend, shown in one sentence without a traceback."""

import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from cifar_transfer.base.text import printable

USER_ERROR_STATUS = 2
SIGNAL_STATUS = 128  # shells add the number of the signal that ended a program

FULL_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FAILING_DISK_ERRORS = (
    errno.EIO,
    # read-only, or somebody else's
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    # a network's disk that is lost, or does not do all that a disk does
    errno.ESTALE,
    errno.EXDEV,
    errno.ENOLCK,
    errno.ENOSYS,
    errno.ENOTSUP,
)


class UserError(Exception):
    """A mistake of the user: what is wrong, where, and what to do about it."""

    def __str__(self) -> str:
        # A DataLoader raises a worker's error again, with the worker's traceback as its message.
        message = super().__str__().rsplit(f"{type(self).__name__}: ", 1)[-1]
        return printable(message.strip())


def check(name: str, value: Any, fits: Callable[[Any], object], requirement: str) -> None:
    """Refuse the value of an option.

    Annotated types would do this on the command line alone; Python gets the same sentence so.

    Args:
        name: Name of the option.
        value: Its value. True and False are refused, because they would count as 1 and 0.
        fits: Returns whether a value is allowed. A TypeError in it means that it is not.
        requirement: What is allowed, as it follows "take" in the message.

    Raises:
        UserError: The value is not allowed.
    """
    try:
        if not isinstance(value, bool) and fits(value):
            return
    except (TypeError, OverflowError):  # a comparison with a number failed
        pass
    shown = "null" if value is None else value
    raise UserError(f"{name} is {shown}: take {requirement}.")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class if it has none."""
    message = str(error).strip() or type(error).__name__
    return message.splitlines()[0]


def caused_by_us(error: BaseException | None) -> UserError | None:
    """Return the `UserError` that a library has wrapped in errors of its own, or None."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error


def disk_fault(error: BaseException | None) -> str | None:
    """Return a sentence about a disk that is full or fails, or None if that is not the cause.

    Libraries may have wrapped the error in their own.
    """
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__
    if error is None:
        return None
    name = error.filename or "A file"
    if error.errno in FULL_DISK_ERRORS:
        return f"{name} cannot be written ({error.strerror}): make room."
    if error.errno in FAILING_DISK_ERRORS:
        reason = error.strerror
        return f"{name} cannot be read or written ({reason}): see to its disk and its permissions."
    return None


@contextmanager
def one_sentence() -> Iterator[None]:
    """End the program with a line on stderr where the user can mend the error.

    These errors end with status 2: a `UserError`, Lightning's errors about settings, and faults of
    the disk. A signal ends the program with the shell's status for it. All other errors pass.
    """
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        # Whoever reads the output has left, as `head` does. Python flushes once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(SIGNAL_STATUS + signal.SIGPIPE)
    except KeyboardInterrupt:
        _end("Interrupted.", SIGNAL_STATUS + signal.SIGINT)
    except SystemExit as error:
        if type(error).__name__ == "SIGTERMException":  # Lightning's
            _end("Terminated.", SIGNAL_STATUS + signal.SIGTERM)
        # After Ctrl-C Lightning ends with status 1.
        if isinstance(error.__context__, KeyboardInterrupt) and error.code == 1:
            _end("Interrupted.", SIGNAL_STATUS + signal.SIGINT)
        raise
    except Exception as error:
        line = _sentence(error)
        if line is None:
            raise
        _end(f"error: {' '.join(line.split())}", USER_ERROR_STATUS)


def _sentence(error: Exception) -> str | None:
    """Return what to say about an error that the user can mend, or None for any other error."""
    # Known by its name, because importing Lightning takes seconds.
    if isinstance(error, UserError) or type(error).__name__ == "MisconfigurationException":
        return str(error)
    fault = disk_fault(error)
    if fault is not None:
        return fault
    # Lightning's errors about settings have several classes, so the place where they were raised
    # tells them apart.
    *_, (last_frame, _) = traceback.walk_tb(error.__traceback__)
    is_lightnings = last_frame.f_globals.get("__name__", "").startswith("lightning.")
    if is_lightnings and isinstance(error, ValueError | TypeError | OSError):
        return str(error)
    return None


def _end(line: str, status: int) -> NoReturn:
    print(line, file=sys.stderr)
    sys.exit(status)
