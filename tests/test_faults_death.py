"""Faults A: death, hangs and signals. Each ends soon, says why, and leaves a checkpoint to go on from."""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import shutil
import signal
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from common.storage import file_sha256
from engine import checkpoint as ckpt
from engine import signals
from engine.distributed import World
from engine.errors import TrainingAborted
from engine.stream import Breadcrumbs
from tests.fault_support import (
    BadWorker,
    all_gone,
    assert_same,
    fit_rank,
    make,
    newest,
    on_two_ranks,
    rows,
    run,
    run_ranks,
    torchrun,
)

pytestmark = pytest.mark.timeout(150)

FOREVER = ["train.max_steps=100000", "train.checkpoint_every=100000", "train.log_every=1"]
TWELVE = ["train.max_steps=12", "train.checkpoint_every=4", "train.timeout_s=10"]


def report(folder: Path, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "errors" / f"rank{rank}.json").read_text())
    return found


@pytest.mark.dist
@pytest.mark.slow
def test_A1_an_elastic_restart_continues_exactly(tiny: list[str], tmp_path: Path) -> None:
    """One rank is killed, the other ends too, and torchrun starts both again: the end of an undisturbed run."""
    with torchrun([*tiny, *TWELVE], "kill@1:7", ("--max-restarts=1",), once=tmp_path / "killed") as job:
        code, output = job.wait()
    assert code == 0 and (tmp_path / "killed").exists(), output[-3000:]
    on_two_ranks(tmp_path, fit_rank, [*tiny, *TWELVE, f"train.output_dir={tmp_path / 'whole'}"])
    assert_same(*(ckpt.load_checkpoint(newest(tmp_path / name)).groups for name in ("run", "whole")))
    assert [row["event"] for row in rows(tmp_path / "run", "events.jsonl")] == ["start", "resume", "start"]


@pytest.mark.dist
@pytest.mark.parametrize("rank", [0, 1])
def test_A2_A14_one_rank_raises_between_collectives(tiny: list[str], tmp_path: Path, rank: int) -> None:
    """It reports its own error, step and files; the other one's connection to it breaks."""
    found = run_ranks(2, tmp_path / "rendezvous", fit_rank, [*tiny, *TWELVE], f"raise@{rank}:7")
    error, other_error = found[rank][1], found[1 - rank][1]
    assert error == "ValueError: injected fault" and other_error is not None and "imed out" not in other_error
    said = report(tmp_path / "run", rank)
    assert (said["rank"], said["step"], said["error"]) == (rank, 7, "ValueError: injected fault")
    assert len(said["files"]) == 2 and all(Path(file).exists() for file in said["files"])
    other = tmp_path / "run" / "errors" / f"rank{1 - rank}.json"
    assert not other.exists() or "injected" not in other.read_text()
    assert newest(tmp_path / "run").name == "step-0000004"


@pytest.mark.dist
@pytest.mark.slow
def test_A3_a_rank_hangs(tiny: list[str], tmp_path: Path) -> None:
    with torchrun([*tiny, *TWELVE, "train.hang_timeout_s=4"], "stop@1:7") as job:
        job.wait_for_step(tmp_path / "run", 7)
        hung, members = time.monotonic(), job.family()
        code, _ = job.wait()
        assert code != 0 and time.monotonic() - hung < 60
        assert all_gone(members, 5)
    assert "imed out" in report(tmp_path / "run", 0)["error"]
    assert "train_step" in (tmp_path / "run" / "errors" / "rank0.stacks.txt").read_text()  # where rank 0 waited


@pytest.mark.dist
def test_A6_a_signal_to_one_worker_only(tiny: list[str], tmp_path: Path) -> None:
    found = on_two_ranks(tmp_path, fit_rank, [*tiny, *FOREVER], "usr1@1:4")
    assert [result["step"] for result in found] == [5, 5]
    assert newest(tmp_path / "run").name == "step-0000005"
    assert json.loads((tmp_path / "run" / "PREEMPTED").read_text())["signal"] == signal.SIGUSR1


def test_A7_a_second_signal_during_the_save(tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saves: list[int] = []
    inner = ckpt.save_checkpoint

    def interrupted(checkpoint: ckpt.Checkpoint, *arguments: Any) -> Path:
        os.kill(os.getpid(), signal.SIGTERM)
        saves.append(checkpoint.step)
        folder = inner(checkpoint, *arguments)
        os.kill(os.getpid(), signal.SIGUSR1)
        return folder

    monkeypatch.setattr(ckpt, "save_checkpoint", interrupted)
    assert not make([*tiny, *FOREVER, "train.checkpoint_every=3"]).fit()
    assert saves == [3, 4]  # the first, which a signal hit; and that of the stop: neither nested
    assert newest(tmp_path / "run").name == "step-0000004"
    assert (tmp_path / "run" / "PREEMPTED").exists()


def test_A8_the_handler_only_sets_a_flag() -> None:
    (function,) = ast.parse(textwrap.dedent(inspect.getsource(signals.StopSignals.remember))).body
    assert isinstance(function, ast.FunctionDef)
    assert [ast.unparse(line) for line in function.body[1:]] == ["self.received = number"]
    with signals.StopSignals() as stop:
        assert all(signal.getsignal(number) == stop.remember for number in (signal.SIGTERM, signal.SIGUSR1))


@pytest.mark.dist
@pytest.mark.slow
def test_A9_sigkill_of_torchrun(tiny: list[str], tmp_path: Path) -> None:
    with torchrun([*tiny, *FOREVER, "data.num_workers=1"]) as job:
        job.wait_for_step(tmp_path / "run", 3)
        children = job.family()[1:]
        assert len(children) >= 4
        job.process.kill()
        assert all_gone(children, 5)


@pytest.mark.parametrize(
    ("what", "said"),
    [("kill", "worker died"), ("hang", "did not answer in time")],
    ids=["A10", "A11"],
)
def test_A10_A11_a_loader_worker_dies_or_hangs(tiny: list[str], what: str, said: str) -> None:
    subject = make([*tiny, *FOREVER, "data.num_workers=1", f"data.worker_timeout_s={12 if what == 'hang' else 600}"])
    victim = subject.run.clips.catalog.clips[4]
    subject.run.clips = BadWorker(subject.run.clips, 4, what)  # type: ignore[assignment]
    start = time.monotonic()
    with pytest.raises(TrainingAborted, match=f"{said} while it read .*{re.escape(str(victim.path))}.*") as death:
        subject.fit()
    assert time.monotonic() - start < 60 and ("after 12 seconds" in str(death.value)) == (what == "hang")


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ("DataLoader worker (pid(s) 12) exited unexpectedly", "/b.mp4"),
        ("DataLoader worker (pid 11) is killed by signal: Killed.", "/a.mp4"),
        ("DataLoader timed out after 5 seconds", "/a.mp4, /b.mp4"),
    ],
    ids=["exited", "killed", "hangs"],
)
def test_A10_A11_only_what_that_worker_read_is_named(tmp_path: Path, said: str, named: str) -> None:
    """With two workers: the one that torch says has died, or both where it does not say which one hangs."""
    crumbs = Breadcrumbs(tmp_path, 0)
    crumbs.folder = tmp_path
    for process, path in (("11", "/a.mp4"), ("12", "/b.mp4")):
        (tmp_path / process).write_text(path)
    assert f"while it read {named}: {said}" in (crumbs.explain(RuntimeError(said)) or "")


def fit_with(world: World, overrides: list[list[str]]) -> None:
    """Train with the overrides of this rank."""
    run(overrides[world.rank], world)


@pytest.mark.dist
@pytest.mark.parametrize("clips", [5, 6])
def test_A12_ranks_that_see_other_data(tiny: list[str], frame_folders: Path, tmp_path: Path, clips: int) -> None:
    """Another number of clips, or as many and one of them another."""
    other = shutil.copytree(frame_folders, tmp_path / "other")
    (other / "falls" / "clip0" / "006.png").unlink()
    overrides = [[*tiny, *TWELVE, f"data.max_clips={clips}"], [*tiny, *TWELVE, f"data.path={other}"]]
    for _, error in run_ranks(2, tmp_path / "rendezvous", fit_with, overrides):
        assert error is not None and "rank 1 has different clips than rank 0" in error
        assert ("clips 6, not 5" in error) == (clips == 5)


def test_A13_a_clean_finish_leaves_a_record(tiny: list[str], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "PREEMPTED").touch()  # of the session before
    run([*tiny, "train.max_steps=3", "train.checkpoint_every=1"])
    record = json.loads((tmp_path / "run" / "COMPLETED").read_text())
    folder = newest(tmp_path / "run")
    assert (record["step"], record["checkpoint"]) == (3, folder.name)
    assert record["sha256"]["model.safetensors"] == file_sha256(folder / "model.safetensors")
    assert not (tmp_path / "run" / "PREEMPTED").exists()
