"""A limit on the time that a call may take."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

Result = TypeVar("Result")


def within(seconds: float, call: Callable[[], Result]) -> Result:
    """Return the result of a call that may never end, such as a download byte by byte.

    Raises:
        TimeoutError: The call has not ended in time. It is left alone, on its own thread.
    """
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    # Unlike an executor's thread, a daemon does not keep the program from ending.
    threading.Thread(target=run, daemon=True).start()
    if wait([future], seconds).not_done:
        raise TimeoutError(f"not finished after {seconds:g} s")
    return future.result()
