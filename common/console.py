"""Progress bars."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

TERMINAL_INTERVAL_S = 0.1
LOG_INTERVAL_S = 30.0  # a log file keeps every line


def progress_bar(total: int, unit: str, label: str | None = None, *, initial: int = 0, shown: bool = True) -> tqdm:
    """Returns a progress bar with remaining time; in a log file it prints a line every 30 seconds."""
    interval = TERMINAL_INTERVAL_S if sys.stderr.isatty() else LOG_INTERVAL_S
    options: dict[str, Any] = {"mininterval": interval, "dynamic_ncols": True, "disable": not shown}
    return tqdm(desc=label, unit=unit, total=total, initial=initial, **options)
