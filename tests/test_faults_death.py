"""Faults A and H: death, hangs, signals and launches, as users and schedulers send and make them."""

import ast
import inspect
import json
import os
import random
import re
import shutil
import signal
import socket
import sys
import textwrap
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import train
from common.storage import file_sha256
from engine import checkpoint as ckpt
from engine import elastic, signals
from engine.distributed import World
from engine.errors import TrainingAborted
from engine.stream import Breadcrumbs
from tests.conftest import TINY
from tests.fault_support import (
    TAG,
    BadWorker,
    Job,
    all_gone,
    assert_same,
    fit_rank,
    logged,
    main_rank,
    make,
    newest,
    on_two_ranks,
    rows,
    run,
    run_ranks,
    same_tensors,
    torchrun,
    with_tag,
)

pytestmark = pytest.mark.timeout(600)

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
    ("what", "said"), [("kill", "worker died"), ("hang", "did not answer in time")], ids=["A10", "A11"]
)
def test_A10_A11_a_loader_worker_dies_or_hangs(tiny: list[str], what: str, said: str) -> None:
    subject = make([*tiny, *FOREVER, "data.num_workers=1", f"data.worker_timeout_s={12 if what == 'hang' else 600}"])
    victim = subject.run.clips.catalog.clips[4]
    subject.run.clips = BadWorker(subject.run.clips, 4, what)  # type: ignore[assignment]
    with pytest.raises(TrainingAborted, match=f"{said} while it read .*{re.escape(str(victim.path))}.*") as death:
        subject.fit()
    assert ("after 12 seconds" in str(death.value)) == (what == "hang")


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


# ---- as users and schedulers do it -----------------------------------------------------------------

BIN = Path(sys.executable).parent
HANDLED = "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
TORCHRUN = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node=2"]
ELASTIC = [sys.executable, "-m", "engine.elastic", "--nproc_per_node=1"]
# in place of Slurm's commands, which are not here: srun starts one task on this machine
STAND_INS = {"srun": 'while [[ $1 == --* ]]; do shift; done\nexec "$@"\n', "scontrol": "exit 0\n"}

# command before the config file, and its number of ranks
LAUNCHERS: dict[str, tuple[list[str], int]] = {
    "torchrun": ([*TORCHRUN, HANDLED, "train.py", "--config"], 2),
    "launch.sh": (["bash", "train_scripts/launch.sh", "train.py"], 2),
    "train_pl": ([*TORCHRUN, HANDLED, "train_pl.py", "--config"], 2),
    "slurm": (["bash", "slurm_scripts/run.sh", "train.py"], 2),
    "python": ([sys.executable, "train.py", "--config"], 1),
}


def start(command: list[str], overrides: list[str], folder: Path, **environment: str) -> Job:
    (folder / "config.yaml").write_text("train: {log_every: 1}\n")
    (tools := folder / "bin").mkdir(exist_ok=True)
    for name, text in STAND_INS.items():
        (tools / name).write_text(f"#!/bin/bash\n{text}")
        (tools / name).chmod(0o755)
    path = f"{tools}:{BIN}:{os.environ['PATH']}"
    return Job([*command, folder / "config.yaml", *overrides], PATH=path, GPUS="2", SLURM_JOB_ID="7", **environment)


def settings(frame_folders: Path, folder: Path) -> list[str]:
    """Overrides of the tiny run into `folder`, with loader workers as by default."""
    keys = [f"data.path={frame_folders}", "data.num_workers=4", f"train.output_dir={folder}"]
    return [*TINY, *keys, "train.checkpoint_every=1000", "train.log_every=1"]


def train_here(ranks: int, overrides: list[str], folder: Path) -> None:
    """Trains in processes of this test, without loader workers, which change no bit."""
    ended = run_ranks(ranks, folder / uuid.uuid4().hex, fit_rank, [*overrides, "data.num_workers=0"])
    assert [error for _, error in ended] == [None] * ranks


@pytest.fixture
def stop_and_continue(frame_folders: Path, tmp_path: Path) -> Callable[..., None]:
    """Stops a run by a signal at a random step, continues it, and compares it with one that nothing disturbed."""

    def check(launcher: str, number: signal.Signals, *, relaunched: bool) -> None:
        command, ranks = LAUNCHERS[launcher]
        folder, whole = tmp_path / "run", tmp_path / "whole"
        common = settings(frame_folders, folder)
        with start(command, [*common, "train.max_steps=2000"], tmp_path) as job:
            job.wait_for_step(folder, random.SystemRandom().randint(3, 12))
            members = job.family()
            # to the launcher alone, or to its process group as a terminal's Ctrl-C does
            os.killpg(job.process.pid, number) if ranks == 1 else job.process.send_signal(number)
            code, output = job.wait(60)
            assert all_gone(members, 10), output[-3000:]
        assert (folder / "PREEMPTED").exists(), f"exit code {code}: {output[-3000:]}"
        stopped = json.loads((folder / "PREEMPTED").read_text())["step"]
        assert newest(folder).name == f"step-{stopped:07d}", output[-3000:]
        if launcher in ("launch.sh", "python"):  # torchrun itself ends in a traceback and with 1
            assert code == (130 if number == signal.SIGINT else 75)
            assert f"stopped by {number.name}" in output.strip().splitlines()[-1], output[-3000:]

        more = f"train.max_steps={stopped + 5}"
        if relaunched:
            with start(command, [*common, more], tmp_path) as job:
                assert job.wait(300)[0] == 0, job.output[-3000:]
        else:
            train_here(ranks, [*common, more], tmp_path)
        train_here(ranks, [*settings(frame_folders, whole), more], tmp_path)
        assert logged(folder) == logged(whole)
        one, other = (ckpt.load_checkpoint(newest(each)).groups for each in (folder, whole))
        assert [kind for kind in other if not same_tensors(one[kind], other[kind])] == []

    return check


@pytest.mark.dist
@pytest.mark.parametrize(("launcher", "number"), [("torchrun", signal.SIGTERM), ("python", signal.SIGINT)])
def test_A4_H1_a_signal_saves_with_loader_workers(
    stop_and_continue: Callable[..., None], launcher: str, number: signal.Signals
) -> None:
    stop_and_continue(launcher, number, relaunched=False)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda number: number.name)
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_A4_A5_H1_every_signal_under_every_launcher(
    stop_and_continue: Callable[..., None], launcher: str, number: signal.Signals
) -> None:
    if (launcher, number) == ("slurm", signal.SIGINT):
        pytest.skip("Slurm sends SIGTERM and the signal of --signal, here SIGUSR1")
    stop_and_continue(launcher, number, relaunched=True)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(10))
def test_H4_no_orphans_of_a_rank_killed_during_its_start(attempt: int, frame_folders: Path, tmp_path: Path) -> None:
    """The moments are spread over the imports of the rank, of its fork server and of its workers."""
    tag = str(tmp_path)
    overrides = [*settings(frame_folders, tmp_path / "run"), "train.max_steps=100000"]
    with start(LAUNCHERS["python"][0], overrides, tmp_path, **{TAG: tag}) as job:
        job.wait_until(lambda: [each for each in with_tag(tag) if "forkserver" in " ".join(each.cmdline())], 60)
        time.sleep(0.5 * attempt)
        job.process.kill()
        job.process.wait(10)
        deadline = time.monotonic() + 15
        while left := with_tag(tag):
            assert time.monotonic() < deadline, [each.cmdline() for each in left]
            time.sleep(0.1)


@pytest.mark.dist
@pytest.mark.parametrize(
    ("only", "keys"),
    [
        (["optim.learning_rate=2e-3", "train.max_steps=7"], ["optim.learning_rate", "train.max_steps"]),
        (["model.depth=4"], ["model.depth"]),
        (["--override", "data_digest"], ["override"]),
    ],
)
def test_H2_ranks_with_different_configurations(
    only: list[str], keys: list[str], frame_folders: Path, tmp_path: Path
) -> None:
    """Every differing key is named, nothing is written, and every rank ends."""
    common = [*settings(frame_folders, tmp_path / "run"), "train.max_steps=4"]
    for _, error in run_ranks(2, tmp_path / "rendezvous", main_rank, train.main, [common, [*common, *only]]):
        assert error is not None
        said = error.partition("rank 1 was started with a different configuration than rank 0")[2]
        assert all(f"{key} " in said for key in keys), error
    assert not (tmp_path / "run").exists()


@pytest.mark.dist
def test_H8_the_port_of_a_launch_is_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"--rdzv-endpoint=127.0.0.1:{server.getsockname()[1]}"
        flags = ["--nnodes=1", "--rdzv-backend=c10d", endpoint, "--rdzv-conf=is_host=true"]
        with start([*ELASTIC, *flags, "train.py", "--config"], [], tmp_path) as job:
            code, output = job.wait()
    assert code == 2 and output.strip().splitlines()[-1].startswith("error: the launch failed")


@pytest.mark.dist
def test_H6_a_mistake_ends_a_launch_with_a_sentence(tmp_path: Path) -> None:
    with start([*ELASTIC, "--standalone", "train.py", "--config"], ["learnig_rate=1"], tmp_path) as job:
        code, output = job.wait()
    assert code == 2 and "unknown key" in output and "Traceback" not in output
    assert output.strip().splitlines()[-1] == "error: rank 0 ended with exit code 2 (its message is above)"


@pytest.mark.parametrize(
    ("number", "codes", "code", "said"),
    [
        (signal.SIGTERM, (75, 75), 75, "stopped by SIGTERM: every process has saved"),
        (signal.SIGINT, (130, 75), 130, "stopped by SIGINT: every process has saved"),
        (signal.SIGTERM, (75, -9), 143, "stopped by SIGTERM: not every process has saved"),
        (signal.SIGUSR1, (), 138, "stopped by SIGUSR1: not every process has saved"),
    ],
)
def test_H6_the_last_line_of_a_stopped_launch(
    number: signal.Signals, codes: tuple[int, ...], code: int, said: str
) -> None:
    found, line = elastic.describe_stop(number, codes)
    assert found == code and line.startswith(said)
