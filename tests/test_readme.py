"""README's commands, each in a fresh shell without the project's environment, after the activation README names."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
COMMANDS = [
    line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines() if shlex.split(line, comments=True)
]


@pytest.mark.parametrize("command", COMMANDS)
def test_command_starts(command: str) -> None:
    """Training is a dry run in one process; a command whose input the user brings ends with an error that names it."""
    words = shlex.split(re.sub(r"(GPUS|--nproc_per_node)=\d+", r"\1=1", command), comments=True)
    flags = {"make": "-n", "train_scripts": "--dry-run", "benchmarks": "--help"}
    flag = next((flags[name] for name in flags if name in command), "")
    ended = subprocess.run(
        ["bash", "-c", f"source {Path(sys.prefix) / 'bin' / 'activate'} && env {shlex.join(words)} {flag}"],
        cwd=ROOT,
        env={"HOME": os.environ["HOME"], "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    if ended.returncode:
        error = next(line for line in ended.stderr.splitlines() if line.startswith("error: "))
        brought = {part for word in words for part in word.split("=") if not (ROOT / part).exists()}
        assert ended.returncode == 2 and any(part in error for part in brought), ended.stderr
