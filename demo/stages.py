"""Runs and times the stages of a demo."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class Stages:
    """Runs the stages of a demo, prints them, and records the seconds of each."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def run(self, name: str, command: list[str]) -> None:
        """Runs a command of the repository from its root. Raises ValueError if it fails."""
        with self.stage(name):
            print("$ " + " ".join(["python" if part == sys.executable else part for part in command]), flush=True)
            threads = {"OMP_NUM_THREADS": "1"} if "torch.distributed.run" in command else {}
            result = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONUNBUFFERED": "1", **threads})
        if result.returncode:
            raise ValueError(f"the demo's {name} failed with exit code {result.returncode}; see the lines above.")

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times the context under `name`."""
        print(f"\n== {name}", flush=True)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = round(time.perf_counter() - start, 1)
            print(f"   {self.seconds[name]} s", flush=True)
