"""torchrun, with two things that the pinned torch's lacks. Flags are torchrun's, and `--shutdown-timeout`.

    python -m engine.elastic --standalone --nproc_per_node=8 --shutdown-timeout=240 train.py --config FILE

- Workers that are asked to stop have `--shutdown-timeout` seconds to write their checkpoint before they are killed.
  torch 2.11 always gives them 30, which a large network on a slow disk exceeds; later ones have this very flag.
- A worker whose exit code says that it would end the same way again ends the run: `--max-restarts` is for crashes.
"""

from __future__ import annotations

import argparse
import functools
import sys

from torch.distributed import run
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import PContext
from torch.distributed.launcher import api

from .errors import MISTAKE_EXIT, PREEMPTED_EXIT, TrainingAborted

FINAL_EXITS = (MISTAKE_EXIT, TrainingAborted.exit_code, PREEMPTED_EXIT)


class Agent(LocalElasticAgent):
    """Starts, watches and restarts the workers of this node."""

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if any(failure.exitcode in FINAL_EXITS for failure in result.failures.values()):
            self._remaining_restarts = 0
        return result


def main(argv: list[str]) -> None:
    """Run the command; ends with torchrun's exit code, which is 1 for whatever a worker failed of."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--shutdown-timeout", type=int, default=30)
    own, torchrun = parser.parse_known_args(argv)
    PContext.close = functools.partialmethod(PContext.close, timeout=own.shutdown_timeout)  # type: ignore
    api.LocalElasticAgent = Agent  # type: ignore[misc]
    run.main(torchrun)


if __name__ == "__main__":
    main(sys.argv[1:])
