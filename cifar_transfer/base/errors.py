"""Errors that a user can mend: shown as one sentence, without a traceback.

`check` in place of annotated types, because they speak on the command line only: this gives Python the same sentence.
`account` goes by the words of jsonargparse's messages, because it gives no structured account of what is wrong.
"""

import errno
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from cifar_transfer.base.text import printable

# Lines of jsonargparse's that describe its search and not the mistake.
BY_THE_WAY = (
    *("Does not validate against any", "Subtypes:", "Errors:", "Given value type:"),
    *("Given value: Namespace(", "Given value: NestedArg("),
)
# What jsonargparse says, and how people would.
PLAINER = {
    r'Parser key "([^"]+)": (?=Expected a (?:<|typing))': r"--\1 takes ",
    r"Expected an? <class '(\w+)'>": r"\1",
    r"Expected a typing\.Literal\[([^\]]*)\]": r"\1",
    r"[;.] (Got|Given) value: ": ", not ",
    r"\bNoneType\b": "null",
}
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Of a disk that fails, is read-only or somebody else's, or that a network has lost or does not serve in full.
FAILING = (
    *(errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.ESTALE, errno.EXDEV),
    *(errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP),
)


class UserError(Exception):
    """What was wrong, where, and what to do about it, in a sentence or two."""

    def __str__(self) -> str:
        # A DataLoader raises a worker's error anew with the worker's traceback as its message; only our words matter.
        return printable(super().__str__().rsplit("UserError: ", 1)[-1].strip())


def check(name: str, value: Any, fits: Callable[[Any], object], wanted: str) -> None:
    """Refuse an option's value that `fits` does not take, and any that is no number, such as a flag.

    Raises:
        UserError: It ends with "take" and what is `wanted`.
    """
    try:
        if not isinstance(value, bool) and fits(value):
            return
    except (TypeError, OverflowError):  # from comparing with numbers what is none, or beyond them
        pass
    raise UserError(f"{name} is {'null' if value is None else value}: take {wanted}.")


def account(message: str) -> str:
    """jsonargparse's message in one line.

    For a value that may have several types it lists one error for each type. An error that says more than "Expected a
    <type>" is the cause; then the others are left out.
    """
    lines = list(dict.fromkeys(line.strip(" -") for line in message.splitlines()))
    lines = [line for line in lines if line and not line.startswith(BY_THE_WAY)]
    causes = [line for line in lines if not line.startswith(("Expected a", "Given value"))]
    told = lines if all(line.startswith("Parser key") for line in causes) else causes
    said = "; ".join(told).replace(":; ", ": ")
    for words, plainer in PLAINER.items():
        said = re.sub(words, plainer, said)
    return said


def caused_by_us(error: BaseException | None) -> "UserError | None":
    """The `UserError` that another library has wrapped in errors of its own, or None."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error


def disk_fault(error: BaseException | None) -> str | None:
    """What an error says of a disk that is full or fails, also if a library has wrapped it in its own; else None."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__
    if error is None or error.errno not in FULL + FAILING:
        return None
    what = error.filename or "A file"
    if error.errno in FULL:
        return f"{what} cannot be written ({error.strerror}): make room."
    return (
        f"{what} cannot be read or written ({error.strerror}): see to its disk and its permissions."
    )


def first_line(error: BaseException) -> str:
    """What an error of somebody else's says, in a line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def one_sentence() -> Iterator[None]:
    """Turn a `UserError`, Lightning's own word on a wrong setting or a disk's fault into a line on stderr and status 2.

    Lightning's comes in several classes, and is known by where it is raised. A signal ends with the shell's status for
    it, 130 or 143.
    """
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:  # whoever reads what is printed has had enough, as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # lest the end of the program complains
        sys.exit(128 + 13)  # as the shell has it for SIGPIPE
    except KeyboardInterrupt:
        _end("Interrupted.", 128 + signal.SIGINT)
    except SystemExit as error:
        if type(error).__name__ == "SIGTERMException":
            _end("Terminated.", 128 + signal.SIGTERM)
        if (
            isinstance(error.__context__, KeyboardInterrupt) and error.code == 1
        ):  # Lightning's, who ends with 1
            _end("Interrupted.", 128 + signal.SIGINT)
        raise
    except Exception as error:
        *_, (last, _) = traceback.walk_tb(error.__traceback__)
        lightnings = last.f_globals.get("__name__", "").startswith("lightning.")
        # By its name, because to import Lightning takes seconds.
        ours = isinstance(error, UserError) or type(error).__name__ == "MisconfigurationException"
        fault = None if ours else disk_fault(error)
        if not (
            ours or fault or (lightnings and isinstance(error, ValueError | TypeError | OSError))
        ):
            raise
        _end(f"error: {' '.join((fault or str(error)).split())}", 2)


def _end(line: str, status: int) -> NoReturn:
    print(line, file=sys.stderr)
    sys.exit(status)
