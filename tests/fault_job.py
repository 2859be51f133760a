"""A command on a file system that fails: `EVENT PATTERN NUMBER ERROR MODULE [options]`.

From the NUMBER-th EVENT on a path that matches PATTERN, the system's call fails with ERROR. Events are those of
Python's audit hooks (https://docs.python.org/3/library/audit_events), by which also the libraries' files are seen;
"fsync"; "then", at which ERROR is a command for the shell, run when such a file is opened; and "full": from when such a
file is opened to be written, no file can grow beyond 10 bytes, as on a full disk.
"""

import errno
import os
import re
import resource
import runpy
import sys


def fail(event, pattern, number, error):
    left, code = int(number), getattr(errno, error, 0)

    def matches(*values):
        nonlocal left
        paths = [
            os.readlink(f"/proc/self/fd/{value}") if type(value) is int else os.fsdecode(value)
            for value in values
        ]
        found = any(re.search(pattern, path) for path in paths)
        left -= found
        return found and left <= 0

    def hook(happened, args):
        if event == "full":
            written = (
                happened == "open"
                and isinstance(args[0], str | bytes)
                and args[2] & (os.O_WRONLY | os.O_RDWR)
            )
            if written and matches(args[0]):
                resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
        elif event == "then":
            if happened == "open" and left > 0 and isinstance(args[0], str) and matches(args[0]):
                os.system(error)
        elif happened == event:
            values = [
                value
                for value in args
                if isinstance(value, str | bytes) or event.startswith("fcntl")
            ]
            if matches(*values[: 2 if event == "os.rename" else 1]) and not (
                event == "fcntl.flock" and args[1] == 8
            ):
                raise OSError(
                    code,
                    os.strerror(code),
                    *(os.fsdecode(value) for value in values if type(value) is not int),
                )

    def fsync(descriptor):
        if matches(descriptor):
            raise OSError(code, os.strerror(code))
        return real(descriptor)

    if event == "fsync":
        real, os.fsync = os.fsync, fsync
    else:
        sys.addaudithook(hook)


if __name__ == "__main__":
    fail(*sys.argv[1:5])
    sys.argv[:] = sys.argv[5:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
