"""Errors that a user can mend, shown in one sentence without a traceback."""

import errno
import os
import signal
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from cifar_transfer.base.text import printable, wrapped

DEBUG = "CIFAR_TRANSFER_DEBUG"  # environment variable that `--debug` sets, also for other processes
USER_ERROR_STATUS = 2
SIGNAL_STATUS = 128  # shells add the number of the signal that ended a program

# Modules that call code of the user's own: hooks of callbacks and data modules, and constructors.
CALLERS_OF_OWN_CODE = ("lightning.", "jsonargparse.", "cifar_transfer.data.module")
PACKAGE = str(Path(__file__).parents[1])
LIBRARIES = (sysconfig.get_path("stdlib"), PACKAGE, "<frozen ")

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
    for wrapped_error in _chain(error):
        if isinstance(wrapped_error, UserError):
            return wrapped_error
    return None


def raised_by_own_code(error: BaseException | None) -> BaseException | None:
    """Return the error of the user's own code that a library has wrapped in its own, or None."""
    for wrapped_error in _chain(error):
        if is_from_own_code(wrapped_error):
            return wrapped_error
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and those that led to it, each once: one that is raised again may be both."""
    yielded: list[BaseException] = []
    while error is not None and error not in yielded:
        yield error
        yielded.append(error)
        error = error.__cause__ or error.__context__


def is_from_own_code(error: BaseException) -> bool:
    """Return whether code of the user's own raised an error, or called what raised it.

    That is a callback, a data module or another class that Lightning, jsonargparse or
    `ImageDataModule` has called. Whoever wrote it needs the traceback.
    """
    caller = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        module = frame.f_globals.get("__name__", "")
        if _is_in_library(frame):
            if not _is_in_standard_library(frame):
                caller = module
        elif caller.startswith(CALLERS_OF_OWN_CODE):
            return True
    return False


def _is_in_library(frame: FrameType) -> bool:
    file = frame.f_code.co_filename
    is_installed = "site-packages" in file or "dist-packages" in file
    return is_installed or file.startswith(LIBRARIES)


def _is_in_standard_library(frame: FrameType) -> bool:
    """Return whether a frame is one of Python's, as those that import a module are."""
    file = frame.f_code.co_filename
    is_installed = "site-packages" in file or "dist-packages" in file
    return not is_installed and not file.startswith(PACKAGE)


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
    the disk; with `--debug` the traceback comes before the line. A signal ends the program with the
    shell's status for it. All other errors pass, and so do those of the user's own code.
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
        if os.environ.get(DEBUG):
            traceback.print_exception(error)
        _end(f"error: {' '.join(line.split())}", USER_ERROR_STATUS)


def _sentence(error: Exception) -> str | None:
    """Return what to say about an error that the user can mend, or None for any other error."""
    if isinstance(error, UserError):
        return str(error)
    if is_from_own_code(error):
        return None
    # Known by its name, because importing Lightning takes seconds.
    if type(error).__name__ == "MisconfigurationException":
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
    print(wrapped(line, sys.stderr), file=sys.stderr)
    sys.exit(status)
