"""torchrun with more time to save, no restarts that are bound to fail, and a final line that says how the run ended.

    python -m engine.elastic --standalone --nproc_per_node=8 --shutdown-timeout=240 train.py --config FILE

Takes torchrun's flags and `--shutdown-timeout`.

- Workers that are asked to stop have `--shutdown-timeout` seconds to write their checkpoint before they are killed.
  torch 2.11 always gives them 30, which a large network on a slow disk exceeds; later versions have this flag.
- A worker whose exit code means that a restart would fail too ends the run: `--max-restarts` is for crashes.
- The last line replaces torchrun's own traceback. Exit code: 75 if a signal stopped the run and every worker saved, 130
  after Ctrl-C, 143 or 138 if a signal stopped workers that did not save; else that of the worker that failed first.
"""

from __future__ import annotations

import argparse
import signal
import sys
from typing import Any

from torch.distributed import DistError, run
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import PContext, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.launcher import api

from .errors import INTERRUPTED_EXIT, MISTAKE_EXIT, PREEMPTED_EXIT, TrainingAborted

SAVED_EXITS = (0, PREEMPTED_EXIT, INTERRUPTED_EXIT)
FINAL_EXITS = (MISTAKE_EXIT, TrainingAborted.exit_code, PREEMPTED_EXIT, INTERRUPTED_EXIT)


class Agent(LocalElasticAgent):
    """Starts, watches and restarts this node's workers; `exit_codes`: of those it stopped last."""

    exit_codes: tuple[int, ...] = ()

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if any(failure.exitcode in FINAL_EXITS for failure in result.failures.values()):
            self._remaining_restarts = 0
        return result

    def _shutdown(self, *arguments: Any, **options: Any) -> None:
        super()._shutdown(*arguments, **options)
        handlers = getattr(self._pcontext, "subprocess_handlers", {})
        Agent.exit_codes = tuple(handler.proc.poll() for handler in handlers.values())


def describe_stop(number: signal.Signals, codes: tuple[int, ...]) -> tuple[int, str]:
    """Returns exit code and last line of a launch stopped by signal `number`; `codes`: the workers' exit codes."""
    saved = bool(codes) and all(code in SAVED_EXITS for code in codes)
    line = "every process has saved; run the same command to continue"
    if not saved:
        line = f"not {line} from the newest checkpoint, if there is one"
    code = INTERRUPTED_EXIT if number == signal.SIGINT else PREEMPTED_EXIT if saved else 128 + number
    return code, f"stopped by {number.name}: {line}"


def describe_failure(error: ChildFailedError) -> tuple[int, str]:
    """Returns the exit code and the last line of a launch in which a worker failed."""
    rank, failure = error.get_first_failure()
    if failure.exitcode < 0:
        return 128 - failure.exitcode, f"error: rank {rank} was killed by {signal.Signals(-failure.exitcode).name}"
    reason = "stopped by a signal, saved" if failure.exitcode in SAVED_EXITS else "its message is above"
    return failure.exitcode, f"error: rank {rank} ended with exit code {failure.exitcode} ({reason})"


def main(argv: list[str]) -> int:
    """Runs the command and returns the exit code."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--shutdown-timeout", type=int, default=30)
    own, torchrun = parser.parse_known_args(argv)
    close = PContext.close
    # torch 2.11's agent passes no timeout; later versions pass their own
    PContext.close = lambda context, sig=None, _=None: close(context, sig, own.shutdown_timeout)  # type: ignore
    api.LocalElasticAgent = Agent  # type: ignore[misc]
    try:
        run.main(torchrun)
    except SignalException as stop:
        code, line = describe_stop(stop.sigval, Agent.exit_codes)
    except ChildFailedError as error:
        code, line = describe_failure(error)
    except (DistError, RendezvousError, OSError) as error:
        code, line = MISTAKE_EXIT, f"error: the launch failed, is the port in use? {str(error).splitlines()[0]}"
    else:
        return 0
    sys.stderr.write(f"{line}\n")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
