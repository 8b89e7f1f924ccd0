"""The error raised for files that cannot be used as clips."""

from __future__ import annotations

from pathlib import Path


class VideoError(ValueError):
    """A clip that cannot be read: `path` and `reason`, in one sentence. It pickles."""

    ends_run = False  # True where no other clip may replace this one

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(str(path), reason)
        self.path, self.reason = str(path), reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"
