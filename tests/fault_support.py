"""Faults on purpose, and small runs of several ranks to inject them into. Never imported by the project itself.

`LATTE_FAULT=kind@rank:step` (several, comma-separated) makes a run that calls `arm()` fail in that way at that rank,
before the update from that step. `python tests/fault_support.py ARGS` is train.py with the faults armed.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

import numpy as np
import psutil
import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map

from datasets import ClipDataset
from engine import checkpoint as ckpt
from engine import cli, start
from engine.config import load_config
from engine.distributed import World
from engine.signals import STOPPING
from engine.trainer import Trainer

# ---- injection -------------------------------------------------------------------------------------


def _change_gradient(parameter: torch.nn.Parameter, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Changes the next gradient of one parameter."""
    hook = parameter.register_hook(lambda gradient: (hook.remove(), change(gradient))[1])


def _non_finite_gradient(trainer: Trainer) -> None:
    """An infinite gradient with a finite loss, in this step only."""
    _change_gradient(next(trainer.state.model.parameters()), lambda gradient: gradient + torch.inf)


def _spoil_next_loss(trainer: Trainer, *fields: str) -> None:
    """NaN for `fields` of the next loss; the loss it reports is NaN in any case."""
    objective = trainer.objective
    inner = objective.loss

    def spoiled(*arguments: Any) -> Any:
        objective.loss = inner  # type: ignore[method-assign]
        result = inner(*arguments)
        nans = {name: getattr(result, name) * torch.nan for name in fields}
        return replace(result, parts={**result.parts, "loss": result.loss.detach() * torch.nan}, **nans)

    objective.loss = spoiled  # type: ignore[method-assign]


def _large_gradient(trainer: Trainer) -> None:
    for parameter in trainer.state.model.parameters():
        _change_gradient(parameter, lambda gradient: gradient * 1000)


def _one_ulp(trainer: Trainer) -> None:
    with torch.no_grad():
        weight = trainer.state.model.blocks[0].mlp.fc1.weight
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(torch.inf))


def _raise(trainer: Trainer) -> None:
    raise ValueError("injected fault")


def _kill_loader_worker(trainer: Trainer) -> None:
    workers = [p for p in psutil.Process().children(recursive=True) if "multiprocessing" in " ".join(p.cmdline())]
    for worker in [p for p in workers if p.ppid() != os.getpid()]:  # the children of the fork server
        worker.kill()


def _full_disk(trainer: Trainer) -> None:
    """The next checkpoint of this process finds the disk full in its middle."""
    inner = ckpt.save_file

    def full(tensors: Any, file: Any) -> None:
        if "optim" in str(file):
            ckpt.save_file = inner
            Path(file).write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        inner(tensors, file)

    ckpt.save_file = full


def _send(name: str, process: Callable[[], int]) -> Callable[[Trainer], None]:
    return lambda trainer: os.kill(process(), signal.Signals[f"SIG{name.upper()}"])


SIGNALS = ("kill", "stop", "term", "int", "usr1")
FAULTS: dict[str, Callable[[Trainer], None]] = {
    **{name: _send(name, os.getpid) for name in SIGNALS},
    **{f"{name}parent": _send(name, os.getppid) for name in SIGNALS},
    "disk": _full_disk,
    "raise": _raise,
    "nan": lambda trainer: _spoil_next_loss(trainer, "loss", "per_clip"),
    "inf": _non_finite_gradient,
    "report": _spoil_next_loss,  # its gradient is finite
    "spike": _large_gradient,
    "ulp": _one_ulp,
    "loader": _kill_loader_worker,
}


# (files, loss) of every step that this process made while armed
TRACE: list[tuple[list[str], float]] = []


def arm(text: str | None = None) -> None:
    """Have every Trainer of this process fail as `text` (by default LATTE_FAULT) says.

    With LATTE_FAULT_ONCE=FILE a fault comes once, however often the run is started again.
    """
    text = os.environ.get("LATTE_FAULT", "") if text is None else text
    faults = [part.replace(":", "@").split("@") for part in text.split(",") if part]  # [kind, rank, step]
    once = Path(os.environ.get("LATTE_FAULT_ONCE", os.devnull))
    honest = Trainer.launch_step

    def faulty(self: Trainer, micro_batches: Any) -> Any:
        self.run.batch_files = self.run.files_of(micro_batches)
        place = [str(self.world.rank), str(self.state.step + (self.in_flight is not None))]
        if fault := next((fault for fault in faults if fault[1:] == place), None):
            faults.remove(fault)
            if str(once) == os.devnull or not once.exists():
                once.touch()
                FAULTS[fault[0]](self)
        parts, stop = honest(self, micro_batches)
        TRACE.append((self.run.batch_files, float(parts["loss"])))
        return parts, stop

    Trainer.launch_step = faulty  # type: ignore[method-assign]


@contextlib.contextmanager
def armed(text: str) -> Iterator[None]:
    """`arm`, within this block only."""
    honest = Trainer.launch_step
    TRACE.clear()
    arm(text)
    try:
        yield
    finally:
        Trainer.launch_step = honest  # type: ignore[method-assign]


class BadWorker(ClipDataset):
    """The data set `clips`, whose loader worker dies or hangs (`what`) while it reads clip `victim`."""

    def __init__(self, clips: ClipDataset, victim: int, what: str) -> None:
        self.__dict__.update(vars(clips), victim=victim, what=what)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        if key[1] == self.victim:
            self.on_open(self.catalog.clips[self.victim].path)
            os.kill(os.getpid(), signal.SIGKILL) if self.what == "kill" else time.sleep(600)
        return super().__getitem__(key)


# ---- runs ------------------------------------------------------------------------------------------


def rows(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl (or events.jsonl)."""
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def make(overrides: list[str], world: World | None = None, **options: Any) -> Trainer:
    """Returns a trainer of this process that has not started."""
    return Trainer(load_config(None, overrides), world or World(), **options)


def run(overrides: list[str], world: World | None = None, **options: Any) -> Trainer:
    """Runs a training in this process; returns its trainer."""
    trainer = make(overrides, world, **options)
    trainer.fit()
    return trainer


def restore(trainer: Trainer) -> list[str]:
    """Returns the notes of restoring the newest checkpoint, as at the start of `fit`."""
    return start.restore(trainer.run, trainer.state, trainer.override, trainer.allow_inexact_resume)


class Job:
    """A command in the background, on the CPU, in a process group of its own. As a context it leaves no process."""

    def __init__(self, command: Sequence[str | Path], cwd: Path = ROOT, **environment: str) -> None:
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "TORCHELASTIC_"))}
        on_cpu = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "MAX_RESTARTS": "0"}
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 it lives as long as the job
        self.started = time.monotonic()
        everything = clean | on_cpu | environment
        self.process = subprocess.Popen(
            command, cwd=cwd, env=everything, stdout=self.log, stderr=subprocess.STDOUT, process_group=0
        )

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        members = self.family()
        for each in members:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        psutil.wait_procs(members, timeout=10)
        self.process.wait(10)

    @property
    def output(self) -> str:
        return os.pread(self.log.fileno(), 10**7, 0).decode()

    def family(self) -> list[psutil.Process]:
        """Returns the process and everything below it that still lives."""
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self.process.pid)
            return [parent, *parent.children(recursive=True)]
        return []

    def wait(self, timeout: float = 90.0) -> tuple[int, str]:
        """(exit code, output)."""
        return self.process.wait(timeout), self.output

    def wait_until(self, condition: Callable[[], Any], seconds: float = 180.0) -> None:
        """Returns once `condition()` holds; fails with the end of the output if the process ends before."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None and time.monotonic() < deadline, self.output[-3000:]
            time.sleep(0.02)

    def wait_for_step(self, folder: Path, step: int) -> None:
        """Returns once the run has logged `step`."""

        def reached() -> bool:
            with contextlib.suppress(FileNotFoundError, ValueError):
                return any(row["step"] >= step for row in rows(folder))
            return False

        self.wait_until(reached)


def torchrun(
    arguments: list[str],
    fault: str = "",
    flags: tuple[str, ...] = (),
    once: Path | None = None,
    *,
    ranks: int = 2,
    script: str = "tests/fault_support.py",
) -> Job:
    """Starts torchrun on `ranks` gloo ranks."""
    launcher = [sys.executable, "-m", "engine.elastic", "--standalone", f"--nproc_per_node={ranks}"]
    environment = {"LATTE_FAULT": fault} | ({"LATTE_FAULT_ONCE": str(once)} if once else {})
    return Job([*launcher, "--shutdown-timeout=5", *flags, script, *arguments], **environment)


def call(main: Callable[[list[str]], int | None], *arguments: str) -> tuple[int, str]:
    """Returns exit code and standard error of a command line, run in this process."""
    error, code = io.StringIO(), None
    with patch.object(sys, "argv", ["program", *arguments]), contextlib.redirect_stderr(error):
        try:
            cli.run(main)
        except SystemExit as end:
            code = end.code
    return int(str(code or 0)), error.getvalue()


@contextlib.contextmanager
def little_memory(more: int) -> Iterator[None]:
    """Lets this process take at most `more` bytes, by the kernel."""
    used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (used + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


TIMING = {"videos_per_second", "seconds_per_step", "data_wait_share", "memory_gib", "seconds"}


def logged(folder: Path, *kinds: str) -> list[dict[str, Any]]:
    """The rows of a run's log, or of these kinds of rows, without what is about time."""
    found = [row for row in rows(folder) if not kinds or row["kind"] in kinds]
    return [{key: value for key, value in row.items() if key not in TIMING} for row in found]


def same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether both hold the same names and bits."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Weights, average and moments are equal in every bit."""
    assert [kind for kind in ("model", "ema", "optim") if not same_tensors(a[kind], b[kind])] == []


def state_of(trainer: Trainer) -> dict[str, Any]:
    """Returns copies of weights, average and moments."""
    saved = trainer.state_dict().groups
    return {kind: {key: value.clone() for key, value in saved[kind].items()} for kind in ("model", "ema", "optim")}


def newest(run: Path) -> Path:
    """Returns the newest checkpoint of a run, which verifies."""
    found, complaints = ckpt.newest_verified(run / "checkpoints")
    assert found is not None and not complaints
    return found


def seal(folder: Path) -> None:
    """Rewrite the manifest of a checkpoint to fit its files."""
    manifest = json.loads((folder / ckpt.MANIFEST).read_text())
    for name in manifest["files"]:
        content = (folder / name).read_bytes()
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / ckpt.MANIFEST).write_text(json.dumps(manifest))


def all_gone(processes: list[psutil.Process], timeout: float) -> bool:
    """Whether all `processes` end within `timeout` seconds."""
    _, alive = psutil.wait_procs(processes, timeout)
    return not [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


TAG = "LATTE_TEST_TAG"  # environment variable that a test's processes inherit, fork servers and loader workers too


def with_tag(tag: str) -> list[psutil.Process]:
    """Returns all processes that live and whose TAG is `tag`, this one apart."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get(TAG) == tag:
                found += [process] if process.status() != psutil.STATUS_ZOMBIE else []
    return found


def begin_rank() -> None:
    """Sets a forked process up as torchrun starts a rank: one thread, and no stop signal blocked.

    The fork server blocks them if a data loader of an earlier test has started it.
    """
    torch.set_num_threads(1)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)


def _rank_main(rank: int, size: int, rendezvous: str, function: Callable[..., Any], arguments: tuple, out: Any) -> None:
    """One rank: join, call `function(world, *arguments)`, send what it returns or raised."""
    begin_rank()
    place, timeout = f"file://{rendezvous}", timedelta(seconds=20)
    try:
        dist.init_process_group("gloo", init_method=place, rank=rank, world_size=size, timeout=timeout)
        result = function(World(rank, size), *arguments)
        # tensors would travel as shared memory, which goes with this process
        plain = tree_map(lambda leaf: leaf.numpy() if isinstance(leaf, torch.Tensor) else leaf, result)
        out.put((rank, plain, None))
    except Exception as error:
        out.put((rank, None, f"{type(error).__name__}: {error}"))


def rank_context() -> ForkServerContext:
    """Returns the context whose processes are forked from one server with the slow imports of every rank done."""
    context = get_context("forkserver")
    context.set_forkserver_preload(
        ["torch", "engine.trainer", "diffusers.models.autoencoders.autoencoder_tiny", "tests.fault_support"]
    )
    return context


def run_ranks(size: int, rendezvous: Path, function: Callable, *arguments: Any) -> list[tuple[Any, str | None]]:
    """`function(world, *arguments)` on `size` gloo ranks, forked from a warm server: (result, error) of each."""
    context = rank_context()
    out = context.Queue()
    common = (size, str(rendezvous), function, arguments, out)
    ranks = [context.Process(target=_rank_main, args=(rank, *common)) for rank in range(size)]
    for process in ranks:
        process.start()
    try:
        found = sorted((out.get(timeout=180) for _ in ranks), key=lambda item: item[0])
    finally:
        for process in ranks:
            process.join(5)
            if process.is_alive():
                process.kill()
    as_tensor = lambda leaf: torch.from_numpy(leaf) if isinstance(leaf, np.ndarray) else leaf  # noqa: E731
    return [(tree_map(as_tensor, result), error) for _, result, error in found]


def on_two_ranks(folder: Path, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Returns the results of `run_ranks` on two ranks, neither of which fails."""
    found = run_ranks(2, folder / f"rendezvous-{uuid.uuid4().hex}", function, *arguments)
    assert [error for _, error in found] == [None, None]
    return [result for result, _ in found]


def fit_rank(world: World, overrides: list[str], fault: str = "") -> dict[str, Any]:
    """Trains as one rank of `run_ranks`; returns counters and tensors that it ended with."""
    with armed(fault):
        trainer = run(overrides, world)
        trace = list(TRACE)
    state = trainer.state
    counters = {"step": state.step, "samples_seen": state.samples_seen, "skipped": state.guard.skipped}
    return {**counters, "trace": trace, **state_of(trainer)}


def main_rank(world: World, main: Callable[[list[str]], int], arguments: list[list[str]]) -> int:
    """A command line as one rank of `run_ranks`, with the arguments of that rank."""
    os.environ.update(RANK=str(world.rank), WORLD_SIZE=str(world.size), LOCAL_RANK=str(world.rank))
    return main(arguments[world.rank])


if __name__ == "__main__":
    import train

    arm()
    cli.run(train.main)
