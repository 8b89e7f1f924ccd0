"""Errors that end a program with a code of their own. Imports nothing, so that `--help` stays quick."""

from __future__ import annotations

MISTAKE_EXIT = 2  # a user's mistake, reported in one sentence
PREEMPTED_EXIT = 75  # EX_TEMPFAIL: stopped by a signal with everything saved; run it again
INTERRUPTED_EXIT = 130  # stopped by Ctrl-C (SIGINT); a training has saved everything


class TrainingAborted(RuntimeError):
    """The run cannot continue by itself; the message says why and what to do."""

    exit_code = 3


class SamplesNotWritten(OSError):
    """Videos are missing at the end of a sampling job; finished ones stay, and a second run may complete them."""

    exit_code = 1


class CheckpointNotWritten(OSError):
    """A checkpoint could not be written; the one before it is intact, and a restart may succeed."""

    exit_code = 1
