"""The launch path: train_scripts/launch.sh, engine/elastic.py, slurm_scripts/, tools/requeue.py, several machines.

Slurm is not here. Its commands are stood in for by scripts on PATH: `srun` runs the command it is given, `scontrol`
notes its arguments and names the nodes. Where no training is needed `python` is one too.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.distributed.elastic.agent.server.api import RunResult, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import ProcessFailure

from engine.elastic import Agent
from tests.conftest import TINY
from tests.fault_support import ROOT, Job, rows
from tools import requeue

SETS = ("ffs", "sky", "taichi", "ucf101")
JOBS = {f"{name}{kind}.slurm": (name, kind) for name in SETS for kind in ("", "_img")}
SHELL_TEXT = ["$(touch MARKER)", "`touch MARKER`", "1; touch MARKER", "a[$(touch MARKER)]", "1 && touch MARKER", ""]


def executable(file: Path, text: str) -> None:
    file.write_text(text)
    file.chmod(0o755)


def launch(folder: Path, overrides: list[str], prefix: tuple[str, ...] = (), **environment: str) -> Job:
    """Starts launch.sh on train.py, on a config file and `overrides`."""
    (folder / "config.yaml").write_text("train: {log_every: 1}\n")
    script = ["bash", "train_scripts/launch.sh", "train.py", folder / "config.yaml"]
    return Job([*prefix, *script, *overrides], **environment)


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in rows(run)] if (run / "metrics.jsonl").exists() else []


WORKER = """
import os, signal, sys, time
log = open(sys.argv[1], "a", buffering=1)
log.write("start " + " ".join(sys.argv[2:]) + "\\n")
codes = sys.argv[2].split(",")
if codes != ["wait"]:
    sys.exit(int(codes[int(os.environ["TORCHELASTIC_RESTART_COUNT"])]))
signal.signal(signal.SIGUSR1, lambda *_: log.write("asked\\n"))
log.write("ready\\n")
time.sleep(60)
"""


@pytest.fixture
def elastic(tmp_path: Path) -> tuple[list[str], Path]:
    """The start of a launcher command on a worker that needs no torch, and what that worker writes."""
    (tmp_path / "worker.py").write_text(WORKER)
    flags = ["--standalone", "--nproc_per_node=1", "--max-restarts=3", "--shutdown-timeout=1"]
    command = [sys.executable, "-m", "engine.elastic", *flags, "--signals-to-handle=SIGTERM,SIGUSR1"]
    return [*command, str(tmp_path / "worker.py"), str(tmp_path / "log")], tmp_path / "log"


@pytest.mark.dist
def test_A2_a_crash_is_restarted_and_a_saved_run_is_not(elastic: tuple[list[str], Path]) -> None:
    """The first start ends with 1 and is followed by a second; that ends with 75, and there is no third."""
    command, log = elastic
    with Job([*command, "1,75,0", "--override", "data_digest", "data.path=/a b"]) as job:
        code, output = job.wait(60)
    assert code == 75, output[-2000:]
    assert log.read_text() == "start 1,75,0 --override data_digest data.path=/a b\n" * 2


@pytest.mark.parametrize(
    ("codes", "left"), [([1], 3), ([-9, 1], 3), ([2], 0), ([3], 0), ([75], 0), ([1, 3], 0), ([], 3)]
)
def test_A2_exit_codes_that_end_a_run(monkeypatch: pytest.MonkeyPatch, codes: list[int], left: int) -> None:
    """Crashes leave the restarts that there are; a mistake, an aborted and a saved run would only end so again."""
    failures = {rank: ProcessFailure(rank, 1, code, "") for rank, code in enumerate(codes)}
    result = RunResult(WorkerState.FAILED, failures=failures)
    monkeypatch.setattr(LocalElasticAgent, "_monitor_workers", lambda self, group: result)
    agent = object.__new__(Agent)
    agent._remaining_restarts = 3
    assert agent._monitor_workers(None) is result  # type: ignore[arg-type]
    assert agent._remaining_restarts == left


@pytest.mark.dist
def test_A5_the_time_for_saving_is_the_launchers(elastic: tuple[list[str], Path]) -> None:
    """A worker that goes on after the signal is killed after --shutdown-timeout, here 1 s; torch's own is 30."""
    command, log = elastic
    with Job([*command, "wait"]) as job:
        job.wait_until(lambda: log.exists() and "ready" in log.read_text())
        start = time.monotonic()
        job.process.send_signal(signal.SIGUSR1)
        assert job.wait(60)[0] != 0
        assert 0.9 < time.monotonic() - start < 25
    assert log.read_text() == "start wait\nready\nasked\n"


ENDS = """
import sys
from engine import cli

class Hangs:
    def __del__(self):
        import time
        time.sleep(60)

def main(argv):
    kept = Hangs()
    if argv == ["returns"]:
        return cli.leave(75)
    raise {"ValueError": ValueError, "RuntimeError": RuntimeError}[argv[0]]("no", kept)

cli.run(main)
"""


@pytest.mark.parametrize(("end", "code"), [("returns", 75), ("ValueError", 2), ("RuntimeError", 1)])
def test_A14_a_worker_ends_before_what_it_used_is_taken_down(end: str, code: int) -> None:
    """However it ends: the destructor of a gloo process group may wait for ever, with all other ranks."""
    with Job([sys.executable, "-c", ENDS, end], TORCHELASTIC_RUN_ID="1", RANK="0") as job:
        found, output = job.wait(20)
    assert found == code and ("no" in output) == (end != "returns")


@pytest.mark.dist
@pytest.mark.slow
def test_G4_two_launches_at_once(frame_folders: Path, tmp_path: Path) -> None:
    common = [*TINY, f"data.path={frame_folders}", "train.max_steps=2"]
    runs = [tmp_path / "one", tmp_path / "two"]
    with contextlib.ExitStack() as stack:
        jobs = [launch(tmp_path, [*common, f"train.output_dir={run}"], GPUS="2") for run in runs]
        ended = [stack.enter_context(job).wait(120) for job in jobs]
    assert [code for code, _ in ended] == [0, 0], ended
    assert all((run / "COMPLETED").exists() for run in runs)
    assert losses(runs[0]) == losses(runs[1]) and len(losses(runs[0])) == 2


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=10)


@pytest.fixture
def two_nodes() -> Iterator[list[tuple[str, str, str]]]:
    """Two network namespaces joined by a cable: (namespace, address, interface) of each."""
    tag = f"{os.getpid() % 100000}"
    nodes = [(f"latte{tag}{side}", f"10.211.7.{number}", f"lt{tag}{side}") for number, side in ((1, "a"), (2, "b"))]
    try:
        try:
            for name, _, _ in nodes:
                ip("netns", "add", name)
            (a, _, one), (b, _, other) = nodes
            ip("link", "add", one, "netns", a, "type", "veth", "peer", "name", other, "netns", b)
            for name, address, interface in nodes:
                ip("-n", name, "address", "add", f"{address}/24", "dev", interface)
                ip("-n", name, "link", "set", interface, "up")
                ip("-n", name, "link", "set", "lo", "up")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no network namespaces here: {getattr(error, 'stderr', None) or error}")
        yield nodes
    finally:
        for name, _, _ in nodes:  # takes its end of the cable along
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                ip("netns", "delete", name)


@pytest.mark.dist
@pytest.mark.slow
def test_two_nodes(two_nodes: list[tuple[str, str, str]], frame_folders: Path, tmp_path: Path) -> None:
    """Two machines of one process, stopped by USR1 and started again, train as two processes of one machine do."""
    common = [*TINY, f"data.path={frame_folders}", "train.max_steps=150", "train.timeout_s=30"]
    one, two = tmp_path / "one", tmp_path / "two"
    with launch(tmp_path, [*common, f"train.output_dir={one}"], GPUS="2") as alone:
        assert alone.wait(90)[0] == 0, alone.output[-3000:]

    cluster = {"NNODES": "2", "HEAD_NODE": two_nodes[0][1], "RDZV_PORT": "10123", "RDZV_ID": "123", "GPUS": "1"}
    for stop, codes, marker in ((True, [75, 75], "PREEMPTED"), (False, [0, 0], "COMPLETED")):
        with contextlib.ExitStack() as stack:
            jobs = []
            for rank, (name, address, interface) in enumerate(two_nodes):
                # the name of this machine is 127.0.0.1 in both
                own = {"NODE_RANK": str(rank), "PET_LOCAL_ADDR": address, "GLOO_SOCKET_IFNAME": interface}
                keys, prefix = [*common, f"train.output_dir={two}"], ("ip", "netns", "exec", name)
                jobs.append(stack.enter_context(launch(tmp_path, keys, prefix, **cluster, **own)))
            if stop:
                jobs[0].wait_until(lambda: len(losses(two)) > 2, 90)
                for job in jobs:
                    job.process.send_signal(signal.SIGUSR1)
            ended = [job.wait(120) for job in jobs]
        assert [code for code, _ in ended] == codes, ended
        assert [name for name in ("PREEMPTED", "COMPLETED") if (two / name).exists()] == [marker]
        assert (len(losses(two)) < 150) == stop
    assert len(losses(one)) == 150
    assert losses(two) == losses(one)


SRUN = '#!/bin/bash\nprintf "%s\\n" "$@" > {here}/srun\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n'
SCONTROL = """#!/bin/bash
printf "%s\\n" "$*" >> {here}/scontrol
if [ -e "$OUT/PREEMPTED" ]; then touch {here}/saved; fi
if [ "$1" = show ]; then printf "node7\\nnode8\\n"; fi
"""
PYTHON = """#!/bin/bash
if [ "$2" = tools.requeue ]; then exec {python} "$@"; fi
printf "%s\\n" "$@" > {here}/launcher
exec bash {here}/training
"""
# what a run does, as far as its folder shows it
WAITS = """
trap 'sleep 0.2; echo {} > $OUT/PREEMPTED; exit 1' USR1
trap 'exit 9' TERM
touch $OUT/started
while :; do sleep 0.02; done
"""
COMPLETES = "echo {} > $OUT/COMPLETED\nkill -ABRT $$\n"
FAILS = "exit 1\n"


class Cluster:
    """A copy of the scripts, without .venv, with our own srun, scontrol and python first on PATH."""

    def __init__(self, folder: Path) -> None:
        self.here = folder / "here"
        self.project = folder / "project"
        self.output = self.project / "results" / "ffs_train"
        for path in (self.here / "bin", self.output):
            path.mkdir(parents=True)
        for name in ("train_scripts", "slurm_scripts"):
            shutil.copytree(ROOT / name, self.project / name)
        (self.project / "tools").mkdir()
        for name in ("__init__.py", "requeue.py"):
            shutil.copy(ROOT / "tools" / name, self.project / "tools" / name)
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("python", PYTHON)):
            executable(self.here / "bin" / name, text.format(here=self.here, python=sys.executable))

    def run(self, training: str, *arguments: str, signal_number: int = 0, **slurm: str) -> tuple[int, str]:
        """(exit code, output) of ffs.slurm as sbatch would start it: a copy elsewhere, from the repository's root.

        `signal_number` is sent to the batch shell once the run has started.
        """
        (self.here / "training").write_text(training)
        spooled = shutil.copy(self.project / "slurm_scripts" / "ffs.slurm", self.here / "slurm_script")
        place = {"PATH": f"{self.here / 'bin'}:/usr/bin:/bin", "OUT": str(self.output)}
        nodes = dict.fromkeys(("SLURM_JOB_NODELIST", "SLURM_NODELIST"), "node[7-8]")
        numbers = {"SLURM_JOB_ID": "4711", "SLURM_NNODES": "1", "SLURM_NODEID": "0"}
        with Job(["bash", spooled, *arguments], self.project, **{**place, **nodes, **numbers, **slurm}) as job:
            if signal_number:
                job.wait_until((self.output / "started").exists, 20)
                job.process.send_signal(signal_number)
            return job.wait(20)

    def called(self, name: str) -> list[str]:
        """The arguments that srun or the launcher got, or the calls of scontrol."""
        file = self.here / name
        return file.read_text().splitlines() if file.exists() else []

    def checkpoint(self, step: int) -> None:
        folder = self.output / "checkpoints" / f"step-{step:07d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").touch()


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


STUCK = "trap '' TERM\ntouch $OUT/started\nexec sleep 60\n"
# training, markers of the session before, signal -> exit code, whether it is queued again, a word of the output
JOB_ENDS = {
    "preempted": (WAITS, (), signal.SIGUSR1, 0, True, "step 40"),
    "preempted by TERM": (WAITS, (), signal.SIGTERM, 0, True, "queued again"),  # srun answers TERM by killing
    "complete": (COMPLETES, ("PREEMPTED",), 0, 0, False, "complete"),  # teardown may abort after the last line
    "failed": (FAILS, ("PREEMPTED", "COMPLETED"), 0, 1, False, "failed"),
    "stopped before it could save": (STUCK, (), signal.SIGUSR1, 0, True, "queued again"),
}


@pytest.mark.parametrize("end", JOB_ENDS)
def test_G5_a_job_is_queued_again_if_it_can_continue(cluster: Cluster, end: str) -> None:
    """Either signal reaches the run as USR1, is waited for, and asks Slurm once; the run's own record counts."""
    training, markers, number, code, again, said = JOB_ENDS[end]
    cluster.checkpoint(40)
    for marker in markers:
        (cluster.output / marker).touch()
    found, text = cluster.run(training, signal_number=number)
    assert (found, cluster.called("scontrol")) == (code, ["requeue 4711"] if again else []), text
    assert said in text
    assert training is not WAITS or (cluster.here / "saved").exists(), "before the run had saved"


def asked(cluster: Cluster, *arguments: str) -> tuple[int, str, int]:
    """`python -m tools.requeue` on the cluster's run: (exit code, output, calls of scontrol so far)."""
    command = [sys.executable, "-S", "-m", "tools.requeue", str(cluster.output), *arguments]
    with Job(command, PATH=f"{cluster.here / 'bin'}:/usr/bin:/bin") as job:
        return *job.wait(20), len(cluster.called("scontrol"))


def test_G5_three_restarts_without_progress_are_enough(cluster: Cluster) -> None:
    (cluster.output / "PREEMPTED").touch()
    cluster.checkpoint(9_999_999)
    for count in (1, 2, 3):
        assert asked(cluster, "4711")[::2] == (0, count)
    code, text, count = asked(cluster, "4711")
    assert (code, count) == (1, 3)
    assert "3 restarts" in text and "step 9999999" in text and str(cluster.output / "requeue.json") in text
    cluster.checkpoint(10_000_000)  # one digit more
    (cluster.output / "checkpoints" / "step-0000001").mkdir()  # unfinished
    assert asked(cluster, "4711")[::2] == (0, 4)
    assert json.loads((cluster.output / "requeue.json").read_text()) == {"step": 10_000_000, "restarts": 1}


@pytest.mark.parametrize("kept", ["", "{", "[]", '{"step": null, "restarts": 2}'])
def test_G5_a_damaged_count_begins_anew(cluster: Cluster, kept: str) -> None:
    (cluster.output / "PREEMPTED").touch()
    (cluster.output / "requeue.json").write_text(kept)
    assert requeue.count_restart(cluster.output)[0] == 1
    assert requeue.count_restart(cluster.output)[0] == 2


@pytest.mark.parametrize("job", ["", "12a", "-1", "4711;ls", "$(ls)", "1_2_3", "١٢", "4711\n"])
def test_G5_other_job_ids_are_refused(cluster: Cluster, job: str) -> None:
    (cluster.output / "PREEMPTED").touch()
    code, text, count = asked(cluster, "--signalled", "--", job) if job == "-1" else asked(cluster, job)
    assert (code, count) == (2, 0) and "not a Slurm job id" in text


def test_G5_an_array_job_a_hold_and_a_refusing_scontrol(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    (cluster.output / "PREEMPTED").touch()
    assert asked(cluster, "4711_3")[::2] == (0, 1)
    assert cluster.called("scontrol") == ["requeue 4711_3"]
    (cluster.output / "HOLD").touch()
    assert asked(cluster, "4711", "--signalled")[::2] == (0, 1)
    (cluster.output / "HOLD").unlink()
    executable(cluster.here / "bin" / "scontrol", "#!/bin/bash\necho no such job >&2\nexit 1\n")
    code, text, _ = asked(cluster, "4711")
    assert code == 1 and "could not be queued again: no such job" in text
    (cluster.here / "bin" / "scontrol").unlink()
    code, text, _ = asked(cluster, "4711")
    assert code == 1 and "scontrol" in text and "Traceback" not in text


def test_G5_the_tool_is_quick() -> None:
    """It runs while Slurm is waiting to kill the job: standard library only."""
    code = "import sys, tools.requeue; print([name for name in ('torch', 'numpy', 'engine') if name in sys.modules])"
    with Job([sys.executable, "-S", "-c", code]) as job:
        assert job.wait(20) == (0, "[]\n")


@pytest.mark.parametrize("job", JOBS)
def test_G6_directives(job: str) -> None:
    """Options, script and config of the job; torchrun must have killed a worker that hangs before Slurm kills all."""
    name, kind = JOBS[job]
    lines = (ROOT / "slurm_scripts" / job).read_text().splitlines()
    asked_for = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]
    assert lines[1 : 1 + len(asked_for)] == [f"#SBATCH {option}" for option in asked_for], "before the first command"
    assert {"--requeue", "--open-mode=append", "--ntasks-per-node=1"} <= set(asked_for)
    (ahead,) = [int(option.removeprefix("--signal=B:USR1@")) for option in asked_for if "--signal" in option]
    grace = re.search(r"SHUTDOWN_TIMEOUT:-(\d+)", (ROOT / "train_scripts" / "launch.sh").read_text())
    assert grace and int(grace[1]) + 30 <= ahead
    script = "train_with_img.py" if kind else "train.py"
    config = f"configs/{name}/{name}{kind}_train.yaml"
    assert lines[-1] == f'exec bash slurm_scripts/run.sh {script} {config} "$@"'
    assert (ROOT / config).is_file() and (ROOT / script).is_file()


def test_G6_one_node(cluster: Cluster) -> None:
    """Arguments of srun and of the launcher, with a value that holds spaces and shell characters."""
    code, text = cluster.run(COMPLETES, "data.path=/a b;$(ls)", "optim.learning_rate=1", SLURM_CPUS_PER_TASK="8")
    assert code == 0, text
    assert {"--ntasks-per-node=1", "--cpus-per-task=8"} <= set(cluster.called("srun"))
    command = cluster.called("launcher")
    assert command[:3] == ["-m", "engine.elastic", "--standalone"]
    expected = ["train.py", "--config", "configs/ffs/ffs_train.yaml", "data.path=/a b;$(ls)", "optim.learning_rate=1"]
    assert command[command.index("train.py") :] == [*expected, "train.output_dir=results/ffs_train"]


@pytest.mark.parametrize(("node", "host"), [("0", "true"), ("1", "false")])
def test_G6_several_nodes(cluster: Cluster, node: str, host: str) -> None:
    """The first node of the list holds the rendezvous, on a port and under a name of the job's own."""
    cluster.output = cluster.project / "elsewhere"
    cluster.output.mkdir()
    code, text = cluster.run(COMPLETES, "train.output_dir=elsewhere", SLURM_NNODES="2", SLURM_NODEID=node)
    assert code == 0, text
    assert cluster.called("scontrol") == ["show hostnames node[7-8]"]
    flags = ["--nnodes=2", "--rdzv-backend=c10d", "--rdzv-endpoint=node7:14711", "--rdzv-id=4711"]
    assert cluster.called("launcher")[2:7] == [*flags, f"--rdzv-conf=is_host={host}"]
    assert cluster.called("launcher")[-1] == "train.output_dir=elsewhere"


@pytest.mark.parametrize("text", SHELL_TEXT)
@pytest.mark.parametrize("name", ["SLURM_NODELIST", "SLURM_JOB_NODELIST", "SLURM_JOB_ID", "SLURM_NNODES"])
def test_D14_shell_text_from_slurm_is_not_run(cluster: Cluster, name: str, text: str) -> None:
    """Whatever a variable of Slurm holds: it is an argument, or refused, and never a command."""
    marker = cluster.here / "marker"
    value = text.replace("MARKER", str(marker))
    code, output = cluster.run(COMPLETES, **{"SLURM_NNODES": "2", name: value})
    assert not marker.exists()
    if name == "SLURM_JOB_NODELIST":
        assert cluster.called("scontrol") == [f"show hostnames {value}"]
    elif name != "SLURM_NODELIST" and value:
        assert code == 2 and f"{name.replace('SLURM_NN', 'NN')}=" in output
        assert cluster.called("srun") == []


@pytest.mark.parametrize("answer", ["$(touch MARKER)", "a b", "-x", "`touch MARKER`", "node7;touch MARKER", ""])
def test_D14_shell_text_from_scontrol_is_not_run(cluster: Cluster, answer: str) -> None:
    marker = cluster.here / "marker"
    (cluster.here / "hosts").write_text(answer.replace("MARKER", str(marker)) + "\n")
    executable(cluster.here / "bin" / "scontrol", f"#!/bin/bash\ncat {cluster.here / 'hosts'}\n")
    code, output = cluster.run(COMPLETES, SLURM_NNODES="2")
    assert code == 2 and "HEAD_NODE=" in output
    assert not marker.exists() and cluster.called("srun") == []
