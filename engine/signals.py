"""Stop signals: a flag, read at the next step boundary, and child processes that do not receive them.

A pre-empted job gets SIGTERM or SIGUSR1 some time before it is killed; Ctrl-C sends SIGINT. torchrun passes SIGTERM
and SIGINT on to the process group of each rank, and SIGUSR1 if started with `--signals-to-handle`
(train_scripts/launch.sh).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from multiprocessing import resource_tracker
from types import FrameType, TracebackType

from .errors import INTERRUPTED_EXIT, PREEMPTED_EXIT

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
PR_SET_PDEATHSIG = 1  # linux/prctl.h
LOADER_PARENT = "LATTE_LOADER_PARENT"  # environment variable: process id of the training process, for its fork server


class StopSignals:
    """While entered, stores the last received of the signals `numbers` in `received` (0: none)."""

    def __init__(self, numbers: Sequence[signal.Signals] = STOPPING) -> None:
        self.numbers = numbers
        self.received = 0
        self._before: dict[signal.Signals, signal._HANDLER] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # no other thread may set handlers
            self._before = {number: signal.signal(number, self.remember) for number in self.numbers}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    @property
    def exit_code(self) -> int:
        """Exit code of a program that a signal stopped after everything was saved: 130 after Ctrl-C, else 75."""
        return INTERRUPTED_EXIT if self.received == signal.SIGINT else PREEMPTED_EXIT

    def remember(self, number: int, frame: FrameType | None) -> None:
        """Signal handler: only sets a flag."""
        self.received = number


@contextlib.contextmanager
def block_in_children() -> Iterator[None]:
    """While entered, new child processes have the stop signals blocked for good; this process receives them on exit.

    torchrun and schedulers signal whole process groups. A signal mask survives exec and fork; ignored
    signals do not survive torch, whose loader workers install their own SIGTERM handler.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        resource_tracker.ensure_running()  # unblocks SIGTERM and SIGINT when it starts the tracker
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def die_with_parent(parent: int | None = None) -> None:
    """Has the kernel kill this process when its parent (a process id, if known) dies or is dead already. Linux only."""
    if sys.platform != "linux":
        return
    parent = parent or os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call
        os.kill(os.getpid(), signal.SIGKILL)
