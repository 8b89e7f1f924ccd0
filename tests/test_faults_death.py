"""Faults A: death, hangs and signals. Each ends soon, says why, and leaves a checkpoint to go on from."""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from common.storage import file_sha256
from engine import checkpoint as ckpt
from engine import launch, signals, trainer
from engine.distributed import World
from engine.errors import TrainingAborted
from engine.stream import Breadcrumbs
from tests.fault_support import (
    ROOT,
    BadWorker,
    Torchrun,
    all_gone,
    cleaned_up,
    family,
    fit_rank,
    make,
    on_two_ranks,
    rows,
    run,
    run_ranks,
    wait_for_step,
)
from tests.test_faults_exactness import assert_same

pytestmark = pytest.mark.timeout(150)

FOREVER = ["train.max_steps=100000", "train.checkpoint_every=100000", "train.log_every=1"]
TWELVE = ["train.max_steps=12", "train.checkpoint_every=4", "train.timeout_s=10"]


def newest(folder: Path) -> Path:
    """The newest checkpoint of a run, which verifies."""
    found, complaints = ckpt.newest_verified(folder / "checkpoints")
    assert found is not None and not complaints
    return found


def report(folder: Path, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "errors" / f"rank{rank}.json").read_text())
    return found


@pytest.mark.dist
@pytest.mark.slow
def test_A1_sigkill_of_one_rank(tiny: list[str], tmp_path: Path) -> None:
    with Torchrun([*tiny, *TWELVE], "kill@1:7") as job:
        code, _ = job.wait()
        assert code != 0 and time.monotonic() - job.started < 60
        assert all_gone(family(job.process), 5)
    assert newest(tmp_path / "run").name == "step-0000004"


@pytest.mark.dist
@pytest.mark.slow
def test_A1_an_elastic_restart_continues_exactly(tiny: list[str], tmp_path: Path) -> None:
    """torchrun --max-restarts starts both ranks again after the kill; the end is that of an undisturbed run."""
    with Torchrun([*tiny, *TWELVE], "kill@1:7", ("--max-restarts=1",), once=tmp_path / "killed") as job:
        code, output = job.wait()
    assert code == 0 and (tmp_path / "killed").exists(), output[-3000:]
    whole = [*tiny, *TWELVE, f"train.output_dir={tmp_path / 'whole'}"]
    on_two_ranks(tmp_path, fit_rank, whole)
    assert_same(*(ckpt.load_checkpoint(newest(tmp_path / name)).groups for name in ("run", "whole")))
    assert [row["event"] for row in rows(tmp_path / "run", "events.jsonl")] == ["start", "resume", "start"]


@pytest.mark.dist
@pytest.mark.slow
def test_A2_one_rank_raises(tiny: list[str], tmp_path: Path) -> None:
    with Torchrun([*tiny, *TWELVE], "raise@1:7") as job:
        code, output = job.wait()
    assert code != 0 and "error (rank 1): injected fault" in output
    found = report(tmp_path / "run", 1)
    assert (found["rank"], found["step"], found["error"]) == (1, 7, "ValueError: injected fault")
    assert len(found["files"]) == 2 and all(Path(file).exists() for file in found["files"])
    other = tmp_path / "run" / "errors" / "rank0.json"
    assert not other.exists() or "injected" not in other.read_text()
    assert newest(tmp_path / "run").name == "step-0000004"


@pytest.mark.dist
@pytest.mark.slow
def test_A3_a_rank_hangs(tiny: list[str], tmp_path: Path) -> None:
    with Torchrun([*tiny, *TWELVE, "train.hang_timeout_s=4"], "stop@1:7") as job:
        wait_for_step(job.process, tmp_path / "run", 7)
        hung, members = time.monotonic(), family(job.process)
        code, _ = job.wait()
        assert code != 0 and time.monotonic() - hung < 60
        assert all_gone(members, 5)
    assert "imed out" in report(tmp_path / "run", 0)["error"]
    stacks = (tmp_path / "run" / "errors" / "rank0.stacks.txt").read_text()
    assert "train_step" in stacks  # where rank 0 waited


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=["A4", "A5"])
def test_A4_A5_a_signal_to_the_launcher(tiny: list[str], tmp_path: Path, number: signal.Signals) -> None:
    """SIGTERM and SIGUSR1 to torchrun as train_scripts/launch.sh starts it."""
    command = ["bash", "train_scripts/launch.sh", "train.py", "configs/folder/folder_train.yaml"]
    environment = {**os.environ, "GPUS": "2", "OMP_NUM_THREADS": "1"}
    extra = ["codec.path=null", "data.labels=auto", "train.precision=fp32", *tiny, *FOREVER]
    job = subprocess.Popen([*command, *extra], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    with cleaned_up(job):
        wait_for_step(job, tmp_path / "run", 3)
        members = family(job)
        job.send_signal(number)
        asked = time.monotonic()
        job.communicate(timeout=30)
        assert time.monotonic() - asked < 10
        assert all_gone(members, 5)
    marker = json.loads((tmp_path / "run" / "PREEMPTED").read_text())
    # torchrun may pass another signal on than it was sent
    assert signal.Signals(marker["signal"]) in (signal.SIGTERM, signal.SIGUSR1)
    assert newest(tmp_path / "run").name == f"step-{marker['step']:07d}"


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
    stopped = make([*tiny, *FOREVER, "train.checkpoint_every=3"])
    assert not stopped.fit()
    assert saves == [3, 4]  # the first, which a signal hit; and that of the stop: neither nested
    assert newest(tmp_path / "run").name == "step-0000004"
    assert (tmp_path / "run" / "PREEMPTED").exists()


def test_A8_the_handler_only_sets_a_flag() -> None:
    source = inspect.getsource(signals.StopSignals.remember)
    (function,) = ast.parse(textwrap.dedent(source)).body
    assert isinstance(function, ast.FunctionDef)
    (_docstring, statement) = function.body
    assert isinstance(statement, ast.Assign) and ast.unparse(statement) == "self.received = number"
    with signals.StopSignals() as stop:
        assert all(signal.getsignal(number) == stop.remember for number in (signal.SIGTERM, signal.SIGUSR1))


@pytest.mark.dist
@pytest.mark.slow
def test_A9_sigkill_of_torchrun(tiny: list[str], tmp_path: Path) -> None:
    with Torchrun([*tiny, *FOREVER, "data.num_workers=1"]) as job:
        wait_for_step(job.process, tmp_path / "run", 3)
        children = family(job.process)[1:]
        assert len(children) >= 4
        job.process.kill()
        assert all_gone(children, 5)


@pytest.mark.parametrize(
    ("what", "said"),
    [("kill", "worker died"), ("segv", "worker died"), ("hang", "did not answer in time")],
)
def test_A10_A11_a_loader_worker_dies_or_hangs(tiny: list[str], what: str, said: str) -> None:
    keys = ["data.num_workers=1", "data.worker_timeout_s=12"] if what == "hang" else ["data.num_workers=1"]
    subject = make([*tiny, *FOREVER, *keys])
    victim = subject.run.clips.catalog.clips[4]
    subject.run.clips = BadWorker(subject.run.clips, 4, what)  # type: ignore[assignment]
    start = time.monotonic()
    with pytest.raises(TrainingAborted, match=f"{said} while it read .*{re.escape(str(victim.path))}.*") as death:
        subject.fit()
    if what == "hang":
        assert "after 12 seconds" in str(death.value)
    else:
        assert time.monotonic() - start < 60  # 5 s of torch, and the start of a worker on a busy machine


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
        assert error is not None and "rank 1 finds other clips than rank 0" in error
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
    lines = inspect.getsource(launch.train)  # the record is written before anything is torn down
    assert lines.index(".fit(loop)") < lines.index("close_world()")


@pytest.mark.dist
def test_A14_rank_0_raises_between_collectives(tiny: list[str], tmp_path: Path) -> None:
    start = time.monotonic()
    found = run_ranks(2, tmp_path / "rendezvous", fit_rank, [*tiny, *TWELVE], "raise@0:3")
    assert found[0][1] == "ValueError: injected fault"
    assert found[1][1] is not None  # the connection to rank 0 broke
    assert time.monotonic() - start < 40
    for module in (trainer, launch):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            final = ast.unparse(ast.Module(node.finalbody, [])) if isinstance(node, ast.Try) else ""
            assert "destroy_process_group" not in final and "close_world" not in final
