"""Requeues a Slurm job if its run asks for it; slurm_scripts/run.sh calls this when the run ends.

    python -m tools.requeue OUTPUT_DIR JOB_ID [--signalled]

The marker files in OUTPUT_DIR decide; the first match counts:

    COMPLETED    the run has reached its last step: done
    HOLD         a user does not want it requeued (touch OUTPUT_DIR/HOLD): done
    PREEMPTED    a signal stopped the run and everything is saved: `scontrol requeue JOB_ID`
    no marker    with --signalled, as PREEMPTED (stopped before it could save); else the run has failed

After 3 restarts without a newer checkpoint the job is not requeued; OUTPUT_DIR/requeue.json counts them.
Exit code 0: done or requeued; 1: neither, for the printed reason; 2: bad arguments.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

MAX_RESTARTS = 3
JOB_ID = re.compile(r"[0-9]+(_[0-9]+)?")
STEP_NAME = re.compile(r"step-([0-9]{7,})")


def count_restart(output: Path) -> tuple[int, int]:
    """Returns (restarts since the newest checkpoint last advanced, this one included; step of that checkpoint)."""
    folders = (output / "checkpoints").glob("step-*/manifest.json")
    found = [STEP_NAME.fullmatch(manifest.parent.name) for manifest in folders]
    now = max((int(match[1]) for match in found if match), default=0)
    record = output / "requeue.json"
    try:
        before = json.loads(record.read_text())
        step, restarts = int(before["step"]), int(before["restarts"])
    except (OSError, ValueError, TypeError, KeyError):
        step, restarts = -1, 0
    restarts = restarts + 1 if now <= step else 1
    temporary = record.with_suffix(".tmp")
    output.mkdir(parents=True, exist_ok=True)
    temporary.write_text(json.dumps({"step": max(now, step), "restarts": restarts}) + "\n")
    temporary.replace(record)
    return restarts, now


def requeue(job: str) -> str:
    """Requeues `job`; returns the error message, or ""."""
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return "" if done.returncode == 0 else done.stderr.strip() or f"exit code {done.returncode}"


def decide(output: Path, job: str, signalled: bool) -> tuple[int, str]:
    """Requeues the job if its run asks for it; returns the exit code and a message."""
    if (output / "COMPLETED").exists():
        return 0, f"{output} is complete."
    if (output / "HOLD").exists():
        return 0, f"not queued again: {output / 'HOLD'} exists; remove it and submit the job to continue."
    if not (output / "PREEMPTED").exists() and not signalled:
        return 1, f"not queued again: the run in {output} failed; its log and {output / 'errors'} say why."
    restarts, step = count_restart(output)
    if restarts > MAX_RESTARTS:
        return 1, (
            f"not queued again: {MAX_RESTARTS} restarts brought {output} no further than step {step}. Give the job "
            f"more time or checkpoint more often (train.checkpoint_every), remove {output / 'requeue.json'} and "
            "submit it again."
        )
    if failure := requeue(job):
        return 1, f"job {job} could not be queued again: {failure}. Submit it once more to continue {output}."
    return 0, f"job {job} is queued again, to continue {output} at step {step}."


def main(argv: list[str]) -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path, help="the run's train.output_dir")
    parser.add_argument("job_id", help="digits, or digits_digits for an array task")
    parser.add_argument("--signalled", action="store_true", help="Slurm has asked the job to stop")
    arguments = parser.parse_args(argv)
    if not JOB_ID.fullmatch(arguments.job_id):
        parser.error(f"{arguments.job_id!r} is not a Slurm job id")
    code, sentence = decide(arguments.output_dir, arguments.job_id, arguments.signalled)
    print(sentence)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
