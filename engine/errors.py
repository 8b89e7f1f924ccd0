"""Exit codes, and errors that have one of their own. Imports nothing, to keep `--help` fast."""

from __future__ import annotations

MISTAKE_EXIT = 2  # a user's mistake, reported in one sentence
PREEMPTED_EXIT = 75  # EX_TEMPFAIL: stopped by a signal with everything saved; run it again
INTERRUPTED_EXIT = 130  # stopped by Ctrl-C (SIGINT); training has saved everything


class TrainingAborted(RuntimeError):
    """The run cannot continue unaided; the message says why and what to do."""

    exit_code = 3


class SamplesNotWritten(OSError):
    """A sampling job ended with videos missing; finished ones are kept, and a second run may add the rest."""

    exit_code = 1


class CheckpointNotWritten(OSError):
    """A checkpoint could not be written; the one before it is intact, and a restart may succeed."""

    exit_code = 1
