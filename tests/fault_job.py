"""A command on a file system that fails: `EVENT PATTERN NUMBER ERROR MODULE [options]`.

From the NUMBER-th EVENT on a path that matches PATTERN, the system's call fails with ERROR. Events
are those of Python's audit hooks (https://docs.python.org/3/library/audit_events), which also see
the libraries' files, and three more:

* "fsync";
* "then": ERROR is a command for the shell, which is run when such a file is opened;
* "full": once such a file is opened to be written, no file can grow beyond 10 bytes.
"""

import errno
import os
import re
import resource
import runpy
import sys

UNLOCK = 8  # `fcntl.LOCK_UN`


class Fault:
    """What fails, and from which time on."""

    def __init__(self, event, pattern, number, error):
        self.event = event
        self.pattern = pattern
        self.left = int(number)
        self.error = error
        self.code = getattr(errno, error, 0)

    def is_due(self, *values):
        """Count a call for paths or open files that match, and return whether it is to fail."""
        paths = []
        for value in values:
            if type(value) is int:
                paths.append(os.readlink(f"/proc/self/fd/{value}"))
            else:
                paths.append(os.fsdecode(value))
        matches = any(re.search(self.pattern, path) for path in paths)
        self.left -= matches
        return matches and self.left <= 0

    def limit_size(self, event, args):
        """Let no file grow any more, once a file is opened to be written."""
        if event != "open" or not isinstance(args[0], str | bytes):
            return
        if args[2] & (os.O_WRONLY | os.O_RDWR) and self.is_due(args[0]):
            resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))

    def run_command(self, event, args):
        """Run a command for the shell when a file is opened."""
        is_open = event == "open" and self.left > 0 and isinstance(args[0], str)
        if is_open and self.is_due(args[0]):
            os.system(self.error)

    def raise_error(self, event, args):
        """Have the system's call fail."""
        if event != self.event or (event == "fcntl.flock" and args[1] == UNLOCK):
            return
        values = args
        if not event.startswith("fcntl"):
            values = [value for value in args if isinstance(value, str | bytes)]
        if event != "os.rename":
            values = values[:1]
        if self.is_due(*values[:2]):
            names = [os.fsdecode(value) for value in values if type(value) is not int]
            raise OSError(self.code, os.strerror(self.code), *names)

    def fail_to_sync(self, fsync):
        """Return an `fsync` that fails."""

        def failing(descriptor):
            if self.is_due(descriptor):
                raise OSError(self.code, os.strerror(self.code))
            return fsync(descriptor)

        return failing


def fail(*arguments):
    """Have calls fail from now on."""
    fault = Fault(*arguments)
    hooks = {"full": fault.limit_size, "then": fault.run_command}
    if fault.event == "fsync":
        os.fsync = fault.fail_to_sync(os.fsync)
    else:
        sys.addaudithook(hooks.get(fault.event, fault.raise_error))


if __name__ == "__main__":
    fail(*sys.argv[1:5])
    sys.argv[:] = sys.argv[5:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
