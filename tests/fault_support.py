"""Faults on purpose, and small runs of several ranks to inject them into. Never imported by the project itself.

`LATTE_FAULT=kind@rank:step` (several, comma-separated) makes a run that calls `arm()` fail in that way at that rank,
before the update from that step. `python tests/fault_support.py ARGS` is train.py with the faults armed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

import numpy as np
import psutil
import torch
from torch.utils._pytree import tree_map

from engine import checkpoint as ckpt
from engine import start
from engine.config import load_config
from engine.distributed import World
from engine.signals import STOPPING
from engine.trainer import Trainer

# ---- injection -------------------------------------------------------------------------------------


def _non_finite_gradient(trainer: Trainer) -> None:
    """An infinite gradient with a finite loss, in this step only."""
    hook = next(trainer.state.model.parameters()).register_hook(
        lambda gradient: (hook.remove(), gradient + torch.inf)[1]
    )


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
        hooks: list[Any] = []
        hooks.append(parameter.register_hook(lambda g, hooks=hooks: (hooks[0].remove(), g * 1000)[1]))


def _one_ulp(trainer: Trainer) -> None:
    with torch.no_grad():
        weight = trainer.state.model.blocks[0].mlp.fc1.weight
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(torch.inf))


def _raise(trainer: Trainer) -> None:
    raise ValueError("injected fault")


def _kill_loader_worker(trainer: Trainer, number: signal.Signals = signal.SIGKILL) -> None:
    workers = [p for p in psutil.Process().children(recursive=True) if "multiprocessing" in " ".join(p.cmdline())]
    loaders = [p for p in workers if p.ppid() != os.getpid()]  # the children of the fork server
    for worker in loaders:
        worker.send_signal(number)


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


SIGNALS = {name: signal.Signals[f"SIG{name.upper()}"] for name in ("kill", "stop", "term", "int", "usr1")}
FAULTS: dict[str, Callable[[Trainer], None]] = {
    **{name: lambda trainer, number=number: os.kill(os.getpid(), number) for name, number in SIGNALS.items()},  # type: ignore[misc]
    **{f"{name}parent": lambda trainer, n=number: os.kill(os.getppid(), n) for name, number in SIGNALS.items()},  # type: ignore[misc]
    "disk": _full_disk,
    "raise": _raise,
    "nan": lambda trainer: _spoil_next_loss(trainer, "loss", "per_clip"),
    "inf": _non_finite_gradient,
    "report": _spoil_next_loss,  # its gradient is finite
    "spike": _large_gradient,
    "ulp": _one_ulp,
    "loader": _kill_loader_worker,
    "sleep": lambda trainer: time.sleep(0.3),
}


# (files, loss) of every step that this process made while armed
TRACE: list[tuple[list[str], float]] = []


def parse(text: str) -> list[tuple[str, int, int]]:
    """`kind@rank:step,...` -> [(kind, rank, step)]; step -1 is every step."""
    parts = [part.replace(":", "@").split("@") for part in text.split(",") if part]
    return [(kind, int(rank), int(step)) for kind, rank, step in parts]


def _happened_before() -> bool:
    """With LATTE_FAULT_ONCE=FILE a fault comes once, however often the run is started again."""
    file = os.environ.get("LATTE_FAULT_ONCE")
    if not file:
        return False
    try:
        Path(file).touch(exist_ok=False)
    except FileExistsError:
        return True
    return False


def arm(text: str | None = None) -> None:
    """Have every Trainer of this process fail as `text` (by default LATTE_FAULT) says."""
    faults = parse(text if text is not None else os.environ.get("LATTE_FAULT", ""))
    honest = Trainer.launch_step

    def faulty(self: Trainer, micro_batches: Any) -> Any:
        self.run.batch_files = self.run.files_of(micro_batches)
        for fault in list(faults):
            kind, rank, step = fault
            if rank == self.world.rank and step in (-1, self.state.step + (self.in_flight is not None)):
                if step != -1:
                    faults.remove(fault)
                if not _happened_before():
                    FAULTS[kind](self)
                break  # one fault a step
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


class BadWorker:
    """A ClipDataset whose loader worker does `what` while it reads clip `victim`."""

    def __init__(self, clips: Any, victim: int, what: str) -> None:
        self.__dict__.update(inner=clips, victim=victim, what=what)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "inner" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.inner, name, value)

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        if key[1] == self.victim:
            self.inner.on_open(self.inner.catalog.clips[self.victim].path)
            WORKER_FAULTS[self.what]()
        return self.inner[key]


WORKER_FAULTS: dict[str, Callable[[], None]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "segv": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "hang": lambda: time.sleep(600),
}

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


class Torchrun:
    """torchrun on `ranks` gloo ranks in the background. As a context it leaves no process behind."""

    def __init__(
        self,
        overrides: list[str],
        fault: str = "",
        flags: tuple[str, ...] = (),
        once: Path | None = None,
        *,
        ranks: int = 2,
        script: str = "tests/fault_support.py",
    ) -> None:
        launcher = [sys.executable, "-m", "engine.elastic", "--standalone", f"--nproc_per_node={ranks}"]
        command = [*launcher, "--shutdown-timeout=5", *flags, script, *overrides]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "LATTE_FAULT": fault, "CUDA_VISIBLE_DEVICES": ""}
        if once is not None:
            environment["LATTE_FAULT_ONCE"] = str(once)
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def __enter__(self) -> Torchrun:
        return self

    def __exit__(self, *_: object) -> None:
        with cleaned_up(self.process):
            pass

    def family(self) -> list[psutil.Process]:
        return family(self.process)

    def wait(self, timeout: float = 90.0) -> tuple[int, str]:
        """(exit code, output)."""
        output, _ = self.process.communicate(timeout=timeout)
        return self.process.returncode, output


def family(process: subprocess.Popen) -> list[psutil.Process]:
    """Returns `process` and everything below it that still lives."""
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        return [parent, *parent.children(recursive=True)]
    return []


@contextlib.contextmanager
def cleaned_up(*processes: subprocess.Popen) -> Iterator[None]:
    """Leaves nothing of `processes` behind, however the block ends."""
    try:
        yield
    finally:
        for process in processes:
            members = family(process)
            for each in members:
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()
            psutil.wait_procs(members, timeout=10)
            process.wait(10)


def wait_for_step(process: subprocess.Popen, folder: Path, step: int, log: Path | None = None) -> None:
    """Returns once the run of `process` has logged `step`; fails with the end of its output if it ends before."""
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError, ValueError):
            if any(row["step"] >= step for row in rows(folder)):
                return
        assert process.poll() is None, (log.read_text() if log else str(process.communicate()))[-3000:]
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached in 180 s")


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
    from datetime import timedelta

    import torch.distributed as dist

    begin_rank()
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size, timeout=timedelta(seconds=20)
        )
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


def run_ranks(
    size: int, rendezvous: Path, function: Callable[..., Any], *arguments: Any
) -> list[tuple[Any, str | None]]:
    """`function(world, *arguments)` on `size` gloo ranks, forked from a warm server: (result, error) of each."""
    context = rank_context()
    out = context.Queue()
    ranks = [
        context.Process(target=_rank_main, args=(rank, size, str(rendezvous), function, arguments, out))
        for rank in range(size)
    ]
    for process in ranks:
        process.start()
    try:
        found = sorted((out.get(timeout=180) for _ in ranks), key=lambda item: item[0])
    finally:
        for process in ranks:
            process.join(5)
            if process.is_alive():
                process.kill()
    return [(tree_map(_as_tensor, result), error) for _, result, error in found]


def on_two_ranks(folder: Path, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Returns the results of `run_ranks` on two ranks, neither of which fails."""
    found = run_ranks(2, folder / f"rendezvous-{uuid.uuid4().hex}", function, *arguments)
    assert [error for _, error in found] == [None, None]
    return [result for result, _ in found]


def _as_tensor(leaf: Any) -> Any:
    return torch.from_numpy(leaf) if isinstance(leaf, np.ndarray) else leaf


def fit_rank(
    world: World, overrides: list[str], fault: str = "", options: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Trains as one rank of `run_ranks`; returns counters and tensors that it ended with."""
    with armed(fault):
        trainer = run(overrides, world, **(options or {}))
        trace = list(TRACE)
    saved = trainer.state_dict()
    return {
        "step": trainer.state.step,
        "samples_seen": trainer.state.samples_seen,
        "skipped": trainer.state.guard.skipped,
        "trace": trace,
        "model": saved.model,
        "ema": saved.ema,
        "optim": saved.optim,
    }


if __name__ == "__main__":
    import train
    from engine import cli

    arm()
    cli.run(train.main)
