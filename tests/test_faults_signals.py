"""Faults A4, A5, H1, H2, H4, H6, H8: stop signals and launches, as users and schedulers send and make them."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

import train
from engine import checkpoint as ckpt
from engine import elastic
from engine.distributed import init_world
from engine.launchers import read_place
from tests.conftest import TINY
from tests.fault_support import (
    TAG,
    Job,
    all_gone,
    fit_rank,
    logged,
    main_rank,
    newest,
    run_ranks,
    same_tensors,
    with_tag,
)

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]

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
    """Starts `command` on a config file and `overrides`."""
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
            job.wait_for_step(folder, random.SystemRandom().randint(3, 30))
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

        more = f"train.max_steps={stopped + 20}"
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


@pytest.mark.parametrize(("launcher", "number"), [("torchrun", signal.SIGTERM), ("python", signal.SIGINT)])
def test_A4_H1_a_signal_saves_with_loader_workers(
    stop_and_continue: Callable[..., None], launcher: str, number: signal.Signals
) -> None:
    stop_and_continue(launcher, number, relaunched=False)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda number: number.name)
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_A4_A5_H1_every_signal_under_every_launcher(
    stop_and_continue: Callable[..., None], launcher: str, number: signal.Signals
) -> None:
    if (launcher, number) == ("slurm", signal.SIGINT):
        pytest.skip("Slurm sends SIGTERM and the signal of --signal, here SIGUSR1")
    stop_and_continue(launcher, number, relaunched=True)


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


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"RANK": "5", "WORLD_SIZE": "2"}, "RANK=5, WORLD_SIZE=2, LOCAL_RANK=0 do not belong together"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE='two': must be a number"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK='-1': must be a number"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
    ],
)
def test_H8_launch_variables_that_do_not_belong_together(variables: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        read_place(variables)


def test_H8_master_port_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(OSError, match=f"MASTER_ADDR:MASTER_PORT=127.0.0.1:{port}.*set another MASTER_PORT"):
            init_world("cpu")


def test_H8_the_port_of_a_launch_is_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"--rdzv-endpoint=127.0.0.1:{server.getsockname()[1]}"
        flags = ["--nnodes=1", "--rdzv-backend=c10d", endpoint, "--rdzv-conf=is_host=true"]
        with start([*ELASTIC, *flags, "train.py", "--config"], [], tmp_path) as job:
            code, output = job.wait()
    assert code == 2 and output.strip().splitlines()[-1].startswith("error: the launch failed")


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
