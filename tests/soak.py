"""A run on two ranks that is killed again and again, and must end as if nothing had happened.

    python tests/soak.py --kills 200 --seed 0

Each session is the same torchrun command, hit by a random fault at a random step. At the end weights, average and
moments must equal those of an undisturbed run bit for bit, with no temporary file and no process left.
"""

import argparse
import os
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

from engine import checkpoint as ckpt
from engine.stream import Breadcrumbs
from tests.conftest import TINY, draw_frame_folders
from tests.fault_support import TAG, all_gone, same_tensors, torchrun, with_tag

# what may hit a session, and how often: SIGKILL of a rank or of torchrun, signals, a full disk, a loader worker
KINDS = ("kill", "kill", "killparent", "term", "int", "usr1", "termparent", "intparent", "usr1parent", "disk", "loader")
SIGNALS = ("--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", "--max-restarts=0")
STAY = {"checkpoints", "config.yaml", "metrics.jsonl", "events.jsonl", "tensorboard", "COMPLETED"}


def last_step(run: Path) -> int:
    """Step of the newest checkpoint."""
    return max((int(folder.name[5:]) for folder in ckpt.list_checkpoints(run / "checkpoints")), default=0)


def session(overrides: list[str], fault: str) -> int:
    """One torchrun, faulty as told; its exit code."""
    with torchrun(overrides, fault, SIGNALS) as job:
        code, output = job.wait(timeout=120 if fault else 3600)
    if not fault and code:
        sys.exit(f"the undisturbed session failed:\n{output[-3000:]}")
    return code


def differences(a: Path, b: Path) -> list[str]:
    """Names of the groups of tensors in which two checkpoints differ."""
    one, other = (ckpt.load_checkpoint(folder).groups for folder in (a, b))
    return [kind for kind in one if not same_tensors(one[kind], other[kind])]


def soak(kills: int, seed: int, workers: int, work: Path) -> list[str]:
    """Everything that went wrong."""
    os.environ[TAG] = str(work)
    draw_frame_folders(work / "data", clips=4)
    steps = 6 * kills + 20
    common = [*TINY, f"data.path={work / 'data'}", f"train.max_steps={steps}", "train.checkpoint_every=5"]
    common += ["train.log_every=1", "train.timeout_s=20", "model.label_dropout=0.5", f"data.num_workers={workers}"]
    disturbed = [*common, f"train.output_dir={work / 'disturbed'}"]
    rng, counts, started = random.Random(seed), Counter[str](), time.monotonic()
    for number in range(1, kills + 1):
        kind, rank, before = rng.choice(KINDS), rng.randrange(2), last_step(work / "disturbed")
        rank = 0 if kind == "disk" else rank  # which is the one that writes
        step = before + rng.randint(0, 9)
        code = session(disturbed, f"{kind}@{rank}:{min(step, steps - 2)}")
        all_gone(with_tag(str(work)), 15)
        if left := with_tag(str(work)):
            return [f"fault {number} ({kind}): {len(left)} processes survive: {left[0].cmdline()}"]
        counts[kind] += 1
        passed = time.monotonic() - started
        print(f"{number:4d} {kind:10s} rank {rank} step {step:5d}  exit {code:4d}  {passed:6.0f} s", flush=True)
    session(disturbed, "")
    session([*common, f"train.output_dir={work / 'whole'}"], "")
    wrong = differences(*(ckpt.list_checkpoints(work / name / "checkpoints")[-1] for name in ("disturbed", "whole")))
    entries = {entry.name for entry in (work / "disturbed").iterdir()}
    strays = sorted(entries - STAY) + [p.name for p in (work / "disturbed" / "checkpoints").glob("*tmp*")]
    crumbs = [Breadcrumbs(work / "disturbed", rank).folder for rank in (0, 1)]
    strays += [str(folder) for folder in crumbs if folder.exists()]
    print(f"{sum(counts.values())} faults ({', '.join(f'{n} {kind}' for kind, n in sorted(counts.items()))})")
    return [f"differs: {name}" for name in wrong] + [f"left over: {name}" for name in strays]


def main() -> int:
    """Entry point; 0 if the disturbed run ended as the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="loader workers of each rank")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="latte_soak_") as folder:
        wrong = soak(arguments.kills, arguments.seed, arguments.workers, Path(folder))
    for line in wrong:
        print(line)
    print("FAILED" if wrong else "bit-identical to the undisturbed run; nothing left over; no process survives")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
