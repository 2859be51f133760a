"""`MemoryWatch`: the most memory that a process and those that it starts have together."""

import threading

import psutil

SECONDS_BETWEEN_LOOKS = 0.5


class MemoryWatch:
    """Look at the memory of a process and of all that it has started, while the context lasts.

    Pages that several processes share are divided among them (the proportional set size), so that
    the sum counts them once. Where the system does not say that (macOS, Windows), only pages of one
    process count. A peak between two looks is missed.

    Args:
        pid: Number of the process.

    Attributes:
        peak_bytes: The largest sum so far.
    """

    def __init__(self, pid: int) -> None:
        self.peak_bytes = 0
        self._pid = pid
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "MemoryWatch":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.is_set():
            self.peak_bytes = max(self.peak_bytes, tree_bytes(self._pid))
            self._ended.wait(SECONDS_BETWEEN_LOOKS)


def tree_bytes(pid: int) -> int:
    """Return the memory of a process and of all below it; 0 if it has ended."""
    try:
        process = psutil.Process(pid)
        processes = [process, *process.children(recursive=True)]
    except psutil.Error:
        return 0
    total = 0
    for process in processes:
        try:
            memory = process.memory_full_info()
        except psutil.Error:  # it has ended meanwhile
            continue
        total += getattr(memory, "pss", memory.uss)
    return total
