"""Queue a Slurm job again where its run asks for it; slurm_scripts/run.sh calls this when the run has ended.

    python -m tools.requeue OUTPUT_DIR JOB_ID [--signalled]

What lies in OUTPUT_DIR decides, the first line that fits:

    COMPLETED    the run has reached its last step: done
    HOLD         somebody does not want it queued again (touch OUTPUT_DIR/HOLD): done
    PREEMPTED    a signal stopped the run and everything is saved: `scontrol requeue JOB_ID`
    no marker    with --signalled, as PREEMPTED: it was stopped before it could save; else the run has failed

After 3 restarts that did not bring the newest checkpoint further the job is left alone; OUTPUT_DIR/requeue.json
counts them. Exit code 0: done or queued again; 1: neither, for the reason printed; 2: bad arguments.
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


def reason_to_stop(output: Path, signalled: bool) -> tuple[int, str] | None:
    """(exit code, sentence) where the job is not to be queued again, else None."""
    if (output / "COMPLETED").exists():
        return 0, f"{output} is complete."
    if (output / "HOLD").exists():
        return 0, f"not queued again: {output / 'HOLD'} is there; remove it and submit the job to go on."
    if not (output / "PREEMPTED").exists() and not signalled:
        return 1, f"not queued again: the run in {output} failed; its log and {output / 'errors'} say why."
    return None


def newest_step(output: Path) -> int:
    """Step of the newest checkpoint, 0 where there is none."""
    folders = (output / "checkpoints").glob("step-*/manifest.json")
    found = [STEP_NAME.fullmatch(manifest.parent.name) for manifest in folders]
    return max((int(match[1]) for match in found if match), default=0)


def count_restart(output: Path) -> int:
    """Counts the restarts, this one included, since the newest checkpoint last advanced."""
    record = output / "requeue.json"
    try:
        before = json.loads(record.read_text())
        step, restarts = int(before["step"]), int(before["restarts"])
    except (OSError, ValueError, TypeError, KeyError):
        step, restarts = -1, 0
    now = newest_step(output)
    restarts = restarts + 1 if now <= step else 1
    aside = record.with_suffix(".tmp")
    output.mkdir(parents=True, exist_ok=True)
    aside.write_text(json.dumps({"step": max(now, step), "restarts": restarts}) + "\n")
    aside.replace(record)
    return restarts


def requeue(job: str) -> str | None:
    """Have Slurm queue `job` again; returns what went wrong, if anything did."""
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return None if done.returncode == 0 else done.stderr.strip() or f"exit code {done.returncode}"


def main(argv: list[str]) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path, help="the run's train.output_dir")
    parser.add_argument("job_id", help="digits, or digits_digits for one of an array")
    parser.add_argument("--signalled", action="store_true", help="Slurm has asked the job to stop")
    arguments = parser.parse_args(argv)
    output, job = arguments.output_dir, arguments.job_id
    if not JOB_ID.fullmatch(job):
        parser.error(f"{job!r} is not a Slurm job id")

    stop = reason_to_stop(output, arguments.signalled)
    if stop:
        code, sentence = stop
        print(sentence)
        return code
    restarts = count_restart(output)
    if restarts > MAX_RESTARTS:
        print(
            f"not queued again: {MAX_RESTARTS} restarts brought {output} no further than step {newest_step(output)}. "
            f"Give the job more time or checkpoint more often (train.checkpoint_every), remove "
            f"{output / 'requeue.json'} and submit it again."
        )
        return 1
    failure = requeue(job)
    if failure:
        print(f"job {job} could not be queued again: {failure}. Submit it once more to continue {output}.")
        return 1
    print(f"job {job} is queued again, to continue {output} at step {newest_step(output)}.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
