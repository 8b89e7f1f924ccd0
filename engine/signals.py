"""Stopping in time: SIGTERM and SIGUSR1 are remembered, and acted on at the next step boundary.

A pre-empted job gets one of them some time before it is killed. torchrun passes SIGTERM on to its workers, and
SIGUSR1 if started with `--signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1` (train_scripts/launch.sh does).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType

STOPPING = (signal.SIGTERM, signal.SIGUSR1)
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class StopSignals:
    """While entered, remembers the last stopping signal of this process in `received` (0: none)."""

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[signal.Signals, signal._HANDLER] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # no other thread may set handlers
            self._before = {number: signal.signal(number, self.remember) for number in STOPPING}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    @property
    def installed(self) -> bool:
        """Whether this process has the handlers."""
        return bool(self._before)

    def remember(self, number: int, frame: FrameType | None) -> None:
        """The handler: sets a flag, and nothing else."""
        self.received = number


@contextlib.contextmanager
def ignored_by_children() -> Iterator[None]:
    """Processes started meanwhile ignore the stopping signals: the loop, not its helpers, answers them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in STOPPING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies, so that none is orphaned. Linux only."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before we asked
        os.kill(os.getpid(), signal.SIGKILL)
