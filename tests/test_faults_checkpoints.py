"""Faults C: checkpoint files. Whatever happens while one is written, one that verifies is there, and is found."""

import copy
import errno
import fcntl
import json
import os
import re
import resource
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections import namedtuple
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from engine import checkpoint as ckpt
from engine.checkpoint import Checkpoint, CheckpointError
from engine.config import Config, load_config
from engine.distributed import World
from engine.errors import CheckpointNotWritten
from engine.run_folder import RunFolder
from engine.trainer import Trainer
from engine.weights import load_model_weights
from tests.fault_support import assert_same, make, on_two_ranks, restore, rows, run, same_tensors, state_of

KILLED = 9
ROOM = r"it takes \d+\.\d+ GB, \d+\.\d+ GB free"
GROUPS = ("model", "ema", "optim", "rng")
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config(None, ["model.name=Latte-S/2"])


def numbered(step: int, size: int = 3) -> Checkpoint:
    tensors = {"w": torch.full((size,), float(step)), "b": torch.arange(4)}
    optim, rng = {"exp_avg/w": torch.ones(3)}, {"cpu/0": torch.zeros(5)}
    return Checkpoint(step, step * 10, tensors, tensors, optim, rng, {"note": 1})


def clones(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def names(root: Path) -> list[str]:
    return sorted(entry.name for entry in root.iterdir())


def assert_sound(root: Path) -> Path:
    """Nothing unfinished lies here, all that is here verifies, and `latest` names one of it; the newest."""
    assert not [name for name in names(root) if ".tmp" in name]
    for folder in ckpt.list_checkpoints(root):
        ckpt.verify(folder)
    ckpt.verify(root / (root / "latest").read_text())
    return ckpt.list_checkpoints(root)[-1]


def in_child(action: Callable[[], Any]) -> tuple[int | None, Any]:
    """(exit code, what `action` returned) of a process forked for it. It must not train."""
    context = get_context("fork")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=lambda: send.send(action()))
    child.start()
    send.close()
    try:
        answer = receive.recv()
    except EOFError:
        answer = None
    child.join()
    return child.exitcode, answer


def sentence_of(action: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(OSError) as raised:
        action(*arguments)
    return str(raised.value)


class Calls:
    """Every call of the operating system that changes files, in `done` as (name, path); dies at the n-th (0: never).

    A write is cut in the middle, anything else does not happen. Nothing is really synced, which is slow and which only
    the death of the whole machine would show.
    """

    WATCHED = ((os, "mkdir"), (os, "rename"), (os, "replace"), (os, "unlink"), (os, "rmdir"), (os, "fsync"),
               (ckpt, "save_file"), (Path, "write_bytes"))  # fmt: skip

    def __init__(self, patch: pytest.MonkeyPatch, die_at: int = 0) -> None:
        self.done: list[tuple[str, str]] = []
        self.die_at = die_at
        for owner, name in self.WATCHED:
            patch.setattr(owner, name, self._watched(name, getattr(owner, name)))

    def _watched(self, name: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            path = arguments[1] if name == "save_file" else arguments[0]
            if name == "fsync":
                path = Path(f"/proc/self/fd/{path}").readlink()
            self.done.append((name, str(path)))
            if len(self.done) != self.die_at:
                return inner(*arguments, **options) if name != "fsync" else None
            if name in ("save_file", "write_bytes"):
                inner(*arguments, **options)
                os.truncate(path, Path(path).stat().st_size // 2)
            os._exit(KILLED)

        return call


def test_C1_disk_full(stopped: Callable[..., Trainer]) -> None:
    """The kernel refuses to let any file grow beyond a limit, in the middle of the optimizer's."""
    trainer = stopped()
    restore(trainer)
    root = trainer.run.folder.checkpoints
    before = names(root)
    limit = (ckpt.list_checkpoints(root)[-1] / "optim.safetensors").stat().st_size - 1000
    trainer.state.step = 4

    def save() -> str:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        return sentence_of(trainer.run.save, trainer.state)

    code, sentence = in_child(save)
    assert code == 0 and re.search(ROOM, sentence), sentence
    assert f"the checkpoint of step 4 in {root} could not be written" in sentence
    assert names(root) == before and assert_sound(root).name == "step-0000003"


@pytest.mark.parametrize("kind", [RuntimeError, SafetensorError, OSError])
def test_C1_disk_full_at_every_write(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    """torch, safetensors and the system each have an error of their own for a full disk."""
    ckpt.save_checkpoint(numbered(1), config, tmp_path)
    writes = 0
    while True:
        with monkeypatch.context() as patch:
            full_disk_at(patch, writes, kind)
            writer = ckpt.CheckpointWriter(tmp_path, config)
            writer.save(numbered(2))
        if writer.failure is None:
            break
        assert "No space left" in writer.failure and re.search(ROOM, writer.failure)
        assert assert_sound(tmp_path).name == ("step-0000001" if writes < 7 else "step-0000002")
        assert (tmp_path / "latest").read_text() == "step-0000001"
        writes += 1
    assert writes == 8  # seven files and `latest`
    assert names(tmp_path) == ["latest", "step-0000001", "step-0000002"]


def full_disk_at(patch: pytest.MonkeyPatch, n: int, kind: type[Exception]) -> None:
    """From the n-th write on (a checkpoint takes 8) there is no space left; half of it goes through."""
    left = [n]

    def limited(inner: Callable[..., Any], place: int) -> Callable[..., Any]:
        def write(*arguments: Any, **options: Any) -> Any:
            result = inner(*arguments, **options)
            left[0] -= 1
            if left[0] < 0:
                os.truncate(arguments[place], Path(arguments[place]).stat().st_size // 2)
                raise kind("No space left on device")
            return result

        return write

    patch.setattr(ckpt, "save_file", limited(ckpt.save_file, 1))
    patch.setattr(Path, "write_bytes", limited(Path.write_bytes, 0))


def fail_to_write(world: World, overrides: list[str]) -> tuple[str, int]:
    """A rank's part of a run that finds the disk full from its second checkpoint on: the error and the step."""
    with pytest.MonkeyPatch.context() as patch:
        full_disk_at(patch, 8, SafetensorError)
        trainer = make(overrides, world)
        return sentence_of(trainer.fit), trainer.state.step


@pytest.mark.dist
@pytest.mark.parametrize("kind", ["C1", "C13"])
def test_C1_C13_all_ranks_learn_of_it(tiny: list[str], tmp_path: Path, kind: str) -> None:
    """C1: at once; C13, written while the training continues: at a step boundary, the same on both."""
    extra = ["train.max_steps=30", "train.checkpoint_every=2", f"train.async_checkpoint={kind == 'C13'}"]
    (sentence, step), other = on_two_ranks(tmp_path, fail_to_write, [*tiny, *extra])
    assert (sentence, step) == other
    assert "the checkpoint of step 4" in sentence and re.search(ROOM, sentence)
    assert 4 <= step <= (4 if kind == "C1" else 29)
    assert assert_sound(tmp_path / "run" / "checkpoints").name == "step-0000002"
    reports = [json.loads((tmp_path / "run" / "errors" / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert all(sentence in report["error"] for report in reports)


def test_C2_early_warning(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, caplog: Any
) -> None:
    """At the start and before each save; no refusal."""
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(10**9, 10**9, 7_000))
    run([*tiny, "train.max_steps=2", "train.checkpoint_every=1"])
    pattern = r"checkpoints has 0\.000 GB free, and a checkpoint takes \d\.\d+ GB: make room"
    assert re.search(f"warning: .*{pattern}", capsys.readouterr().err.partition("step 1/2")[0])
    assert len(re.findall(pattern, caplog.text)) == 2
    assert_sound(tmp_path / "run" / "checkpoints")


def test_C2_a_tenth_to_spare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for free in (1_099, 1_100):
        monkeypatch.setattr(shutil, "disk_usage", lambda place, free=free: Usage(0, 0, free * 10**6))
        sentence = ckpt.space_warning(tmp_path / "not" / "there yet", 10**9)
        assert "has 1.099 GB free, and a checkpoint takes 1.000 GB" in str(sentence) if free == 1_099 else not sentence


def test_C2_the_size_is_that_of_the_files(stopped: Callable[..., Trainer]) -> None:
    """The estimate before the first save is within a tenth of what the files then take."""
    trainer = stopped()
    restore(trainer)
    files = ckpt.list_checkpoints(trainer.run.folder.checkpoints)[-1].glob("*.safetensors")
    tensors = sum(value.nbytes for file in files for value in load_file(file).values())
    assert trainer.state_dict().num_bytes == tensors


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory: pytest.TempPathFactory, config: Config) -> Path:
    root = tmp_path_factory.mktemp("two_saved")
    for step in (8, 9):
        ckpt.save_checkpoint(numbered(step), config, root)
    return root


def test_C3_killed_at_every_call(
    two_saved: Path, tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 10 is written over 8 and 9 by a process that dies at its n-th call, for every n."""
    monkeypatch.setattr(Config, "to_yaml", lambda self: "train: {}\n")  # quicker
    found, points = "", 0
    while True:
        root = tmp_path / str(points)
        shutil.copytree(two_saved, root)

        def save(root: Path = root, die_at: int = points + 1) -> None:
            Calls(pytest.MonkeyPatch(), die_at)
            ckpt.save_checkpoint(numbered(10), config, root, keep_last=2)

        code, _ = in_child(save)
        newest, complaints = ckpt.newest_verified(root)
        assert newest is not None and not complaints, points
        assert newest.name >= max(found, "step-0000009"), points  # what is written stays written
        found = newest.name
        ckpt.verify(root / (root / "latest").read_text())
        assert ckpt.recover_newest(root) == (newest, [])
        assert assert_sound(root) == newest
        if code == 0:
            break
        assert code == KILLED, points
        points += 1
    assert points >= 20
    assert found == "step-0000010"
    assert [folder.name for folder in ckpt.list_checkpoints(root)] == ["step-0000009", "step-0000010"]


def test_C3_resume_after_a_kill(stopped: Callable[..., Trainer], tiny: list[str], tmp_path: Path) -> None:
    """The run's own save dies; the same command cleans up, continues, and ends as if nothing had happened."""
    dying = stopped("train.keep_last=2")
    restore(dying)
    dying.state.step = 4  # what would be step 4 holds the weights of step 3: it must not be continued
    root = dying.run.folder.checkpoints

    def save() -> None:
        Calls(pytest.MonkeyPatch(), die_at=17)
        dying.run.save(dying.state)

    assert in_child(save)[0] == KILLED
    assert [name for name in names(root) if ".tmp-" in name]
    continued = Trainer(dying.config, World())
    assert continued.fit()
    assert [row["step"] for row in rows(root.parent, "events.jsonl") if row["event"] == "resume"][-1] == 3
    assert assert_sound(root).name == "step-0000005"
    whole = run([*tiny, "train.max_steps=5", f"train.output_dir={tmp_path / 'whole'}"])
    assert_same(state_of(continued), state_of(whole))


def test_C4_order_of_the_calls(two_saved: Path, tmp_path: Path, config: Config) -> None:
    """Files next to the target, each synced, manifest last; rename; sync the folder; `latest`; prune."""
    root = tmp_path / "run"
    shutil.copytree(two_saved, root)
    with pytest.MonkeyPatch.context() as patch:
        calls = Calls(patch)
        ckpt.save_checkpoint(numbered(10), config, root)
    done = [(name, re.sub(r"[0-9a-f]{8}$|(?<=tmp-)[0-9a-f]{8}(?=/)", "*", path)) for name, path in calls.done]
    aside = f"{root}/step-0000010.tmp-*"
    files = [*(f"{name}.safetensors" for name in GROUPS), "state.json", "config.yaml", "manifest.json"]
    writes = [(name, path) for name, path in done if name in ("save_file", "write_bytes")]
    assert [path for _, path in writes] == [*(f"{aside}/{name}" for name in files), f"{root}/latest.tmp-*"]
    expected = [("mkdir", str(root)), ("mkdir", aside)]
    for write in writes[:-1]:
        expected += [write, ("fsync", write[1])]
    expected += [("fsync", aside), ("rename", aside), ("fsync", str(root)), ("mkdir", str(root))]
    # `latest`, which would be removed if it were still there under its first name
    expected += [writes[-1], *((name, writes[-1][1]) for name in ("fsync", "replace", "unlink")), ("fsync", str(root))]
    expected += [("rename", f"{root}/step-0000008")]
    assert done[: len(expected)] == expected
    assert {name for name, _ in done[len(expected) :]} == {"unlink", "rmdir"}


def truncate(folder: Path) -> None:
    os.truncate(folder / "optim.safetensors", 500)


def flip(file: str, place: float) -> Callable[[Path], object]:
    """Changes one byte, not the size: safetensors itself loads such a file without a word."""

    def change(folder: Path) -> None:
        content = bytearray((folder / file).read_bytes())
        content[int(place * len(content))] ^= 0x10
        (folder / file).write_bytes(content)

    return change


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (truncate, "optim.safetensors does not match its SHA-256"),
    "flipped header": (flip("model.safetensors", 0), "model.safetensors does not match its SHA-256"),
    "flipped weight": (flip("ema.safetensors", 0.5), "ema.safetensors does not match its SHA-256"),
    "flipped state": (flip("state.json", 0.5), "state.json does not match its SHA-256"),
    "file": (lambda folder: (folder / "rng.safetensors").unlink(), "rng.safetensors is missing"),
    "cut manifest": (lambda folder: os.truncate(folder / "manifest.json", 100), "no readable manifest.json"),
    "empty manifest": (
        lambda folder: (folder / "manifest.json").write_text(json.dumps({"format": ckpt.FORMAT, "files": {}})),
        "manifest.json does not list ema.safetensors",
    ),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "no readable manifest.json"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_C5_C6_damaged_newest(stopped: Callable[..., Trainer], tmp_path: Path, kind: str, caplog: Any) -> None:
    damage, said = DAMAGES[kind]
    trainer = stopped()
    newest = trainer.run.folder.checkpoints / "step-0000003"
    damage(newest)
    for read in (ckpt.find_checkpoint, load_model_weights):  # by its own path: no other is taken
        with pytest.raises(CheckpointError, match=f"{newest}.*{said}"):
            read(newest)
    other = stopped(f"train.resume={newest}", f"train.output_dir={tmp_path / 'other'}")
    with pytest.raises(CheckpointError, match=said):
        restore(other)
    assert ckpt.find_checkpoint(tmp_path / "run").name == "step-0000002"  # by the run: with a warning
    assert said in caplog.text and "Taking step-0000002 instead" in caplog.text
    notes = restore(trainer)
    assert trainer.state.step == 2
    (warning,) = [note for note in notes if note.startswith("warning: ")]
    assert said in warning and str(newest) in warning and warning.endswith("It is set aside.")


def test_C5_nothing_left_is_an_error(stopped: Callable[..., Trainer]) -> None:
    trainer = stopped()
    for folder in ckpt.list_checkpoints(trainer.run.folder.checkpoints):
        truncate(folder)
    before = clones(trainer.state.model)
    with pytest.raises(ValueError, match=r"step-0000003 is damaged.*step-0000001 is damaged.*No other checkpoint"):
        trainer.fit()
    assert trainer.state.step == 0 and same_tensors(clones(trainer.state.model), before)
    assert len(ckpt.list_checkpoints(trainer.run.folder.checkpoints)) == 3


def test_C5_damaged_ones_are_not_counted_among_those_kept(stopped: Callable[..., Trainer]) -> None:
    trainer = stopped("train.keep_last=2", "train.checkpoint_every=4")
    truncate(trainer.run.folder.checkpoints / "step-0000003")
    assert trainer.fit()
    kept = [folder.name for folder in ckpt.list_checkpoints(trainer.run.folder.checkpoints)]
    assert kept == ["step-0000004", "step-0000005"]
    assert_sound(trainer.run.folder.checkpoints)
    (aside,) = trainer.run.folder.checkpoints.glob("step-0000003.damaged-*")
    assert (aside / "model.safetensors").is_file()  # nothing is deleted that may still be wanted


KEPT = {
    "numeric order": ((8, 9, 10, 9_999_999, 10_000_000), {"keep_last": 2}, [9_999_999, 10_000_000]),
    "some for good": (range(1, 9), {"keep_last": 2, "keep_every": 3}, [3, 6, 7, 8]),
    "the one just written": ((9, 5), {"keep_last": 1}, [5, 9]),  # 9 is of a run that continued from here before
}


@pytest.mark.parametrize("case", KEPT)
def test_C7_checkpoints_that_are_kept(tmp_path: Path, config: Config, case: str) -> None:
    steps, keep, kept = KEPT[case]
    for step in steps:
        ckpt.save_checkpoint(numbered(step), config, tmp_path, **keep)
    assert [int(folder.name[5:]) for folder in ckpt.list_checkpoints(tmp_path)] == kept
    assert_sound(tmp_path)


def test_C3_C7_only_what_is_ours_is_cleaned(tmp_path: Path, config: Config) -> None:
    """Links, folders of other names and unfinished ones that we do not write stay."""
    root, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    ckpt.save_checkpoint(numbered(1), config, elsewhere)
    root.mkdir()
    links = ["step-0000001", "step-0000011.tmp-0123abcd"]
    for name in links:
        (root / name).symlink_to(elsewhere / "step-0000001")
    foreign = ["step-12.bak", "step-0000001.bak", "step-12", "best", "notes.tmp", "step-0000010.tmp-mine"]
    foreign.append("step-0000002.damaged-01234567")
    for name in [*foreign, "step-0000010.tmp-0123abcd"]:
        (root / name).mkdir()
    for name in ("step-0000002", "latest.tmp-0123abcd"):
        (root / name).write_text("a file")
    for step in (3, 4, 5):
        ckpt.save_checkpoint(numbered(step), config, root, keep_last=2)
    ckpt.recover_newest(root)
    assert [folder.name for folder in ckpt.list_checkpoints(root)] == ["step-0000004", "step-0000005"]
    assert names(root) == sorted([*links, *foreign, "latest", *(f"step-000000{n}" for n in (2, 4, 5))])
    ckpt.verify(elsewhere / "step-0000001")


def test_C7_pruned_only_after_the_new_one_verifies(
    two_saved: Path, tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "run"
    shutil.copytree(two_saved, root)
    rename = os.rename

    def rename_and_rot(source: Any, target: Any) -> None:
        rename(source, target)
        truncate(Path(target))

    monkeypatch.setattr(os, "rename", rename_and_rot)
    with pytest.raises(CheckpointError, match=r"step-0000010 is damaged"):
        ckpt.save_checkpoint(numbered(10, 1000), config, root, keep_last=1)
    assert (root / "latest").read_text() == "step-0000009"
    for step in (8, 9):
        ckpt.verify(ckpt.step_folder(root, step))


@pytest.mark.parametrize("call", ["rename", "rmdir"])
def test_C8_an_old_one_that_cannot_be_deleted(
    stopped: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, call: str
) -> None:
    """Substitute: root may delete everything, so the system call itself says no."""
    trainer = stopped("train.keep_last=2")
    inner = getattr(os, call)

    def denied(path: Any, *arguments: Any, **options: Any) -> Any:
        if "step-0000001" in str(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return inner(path, *arguments, **options)

    monkeypatch.setattr(os, call, denied)
    assert trainer.fit()
    assert trainer.state.step == 5
    assert re.search(r"old checkpoint \S+step-0000001 cannot be deleted: Permission denied", caplog.text)
    kept = [folder.name for folder in ckpt.list_checkpoints(trainer.run.folder.checkpoints)]
    assert kept[-2:] == ["step-0000004", "step-0000005"]
    assert "step-0000002" not in kept  # the others go nevertheless
    monkeypatch.undo()
    assert Trainer(trainer.config, World()).fit()  # the next start
    assert not list(trainer.run.folder.checkpoints.glob("*.tmp-*"))


def test_C9_a_file_in_the_way(stopped: Callable[..., Trainer], tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("precious")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "checkpoints").write_text("precious")
    for place, culprit in ((file, file), (file / "run", file), (tmp_path / "half", tmp_path / "half" / "checkpoints")):
        trainer = stopped(f"train.output_dir={place}")
        with pytest.raises(OSError, match=rf"train\.output_dir={place} .*{culprit} is a file; name a folder"):
            trainer.fit()
        assert trainer.state.step == 0  # at the start, and not at the first save
        assert culprit.read_text() == "precious"
    assert not (tmp_path / "half" / ".lock").exists()


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that any user can enter, which pytest's are not."""
    with tempfile.TemporaryDirectory(prefix="latte-test-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.mark.parametrize("place", [".", "checkpoints"])
def test_C9_read_only(stopped: Callable[..., Trainer], public: Path, place: str) -> None:
    """Root writes everywhere, so the run's part is played by a process that has given up its rights."""
    folder = public / "run"
    (folder / "checkpoints").mkdir(parents=True)
    for path in (folder, folder / "checkpoints"):
        path.chmod(0o777)
    (folder / place).chmod(0o555)
    trainer = stopped(f"train.output_dir={folder}")

    def fit() -> str:
        if os.getuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        return sentence_of(trainer.fit)

    assert in_child(fit) == (0, f"train.output_dir={folder} cannot be written: Permission denied.")
    assert names(folder) == ["checkpoints"]


def fit_watched(world: World, overrides: list[str], folder: str) -> list[str]:
    """Trains as one rank; returns its changes under `folder`, as seen by the interpreter's own audit."""
    changed: list[str] = []
    changing = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.symlink")

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event in changing or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            path = str(arguments[0])
            if path.startswith(folder):
                changed.append(f"{event} {os.path.relpath(path, folder)}")

    sys.addaudithook(note)  # for good: but this process ends with the test
    run(overrides, world)
    return changed


@pytest.mark.dist
def test_C9_only_rank_0_writes(tiny: list[str], tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    extra = ["train.max_steps=2", "train.checkpoint_every=1"]
    first, second = on_two_ranks(tmp_path, fit_watched, [*tiny, *extra], folder)
    assert sum(change.startswith("os.rename checkpoints/step-") for change in first) == 2 and len(first) > 20
    # where its stacks would go if it hung: a file of its own
    assert {entry.split()[1] for entry in second} <= {"errors", "errors/rank1.stacks.txt"}


@pytest.mark.parametrize(("asynchronous", "value"), [(False, float("nan")), (True, float("inf"))])
def test_C10_not_finite(stopped: Callable[..., Trainer], value: float, asynchronous: bool) -> None:
    trainer = stopped(f"train.async_checkpoint={asynchronous}")
    restore(trainer)
    root = trainer.run.folder.checkpoints
    before = names(root)
    with torch.no_grad():
        trainer.state.model.blocks[1].mlp.fc1.weight[0, 0] = value
    trainer.state.step = 4
    said = r"refusing to save step 4: model has non-finite values in blocks\.1\.mlp\.fc1\.weight\."
    with pytest.raises(CheckpointNotWritten, match=said):
        trainer.run.save(trainer.state)
        trainer.run.writer.wait()
        trainer.run.raise_failed_write()
    assert names(root) == before and assert_sound(root).name == "step-0000003"


@pytest.mark.parametrize("group", GROUPS)
def test_C10_in_any_part(tmp_path: Path, config: Config, group: str) -> None:
    bad = numbered(2)
    setattr(bad, group, {"w": torch.tensor([1.0, float("-inf")])})
    with pytest.raises(CheckpointError, match=rf"{group} has non-finite values in w"):
        ckpt.save_checkpoint(bad, config, tmp_path)
    assert not names(tmp_path)


def test_C11_two_runs_in_one_folder(stopped: Callable[..., Trainer]) -> None:
    first, second = stopped(), stopped()
    first.run.folder.open()
    before = names(first.run.folder.checkpoints)
    owner = f"{socket.gethostname()}:{os.getpid()}"
    said = f"{first.run.folder.path} is being written by {owner}; stop that run or name another folder."
    assert in_child(lambda: sentence_of(second.fit)) == (0, f"train.output_dir={said}")
    assert sentence_of(second.fit) == f"train.output_dir={said}"  # within one process too
    assert second.state.step == 0
    assert names(first.run.folder.checkpoints) == before
    first.run.folder.lock.release()
    assert second.fit() and not (first.run.folder.path / ".lock").exists()


def contend(folder: Path, gate: Any, answers: Any) -> None:
    held = RunFolder(folder)
    gate.wait()
    try:
        held.open()
        answers.put(os.getpid())
        signal.pause()
    except OSError as error:
        answers.put(str(error))


def test_C11_at_the_same_moment(tmp_path: Path) -> None:
    """Six processes start at once: one gets the folder, the others name it as the owner."""
    context = get_context("fork")
    gate, answers = context.Barrier(6), context.Queue()
    children = [context.Process(target=contend, args=(tmp_path / "run", gate, answers)) for _ in range(6)]
    for child in children:
        child.start()
    found = [answers.get(timeout=20) for _ in children]
    for child in children:
        child.kill()
        child.join()
    (winner,) = [each for each in found if isinstance(each, int)]
    # it may not have signed yet
    refusal = f"is being written by ({socket.gethostname()}:{winner}|another process);"
    assert sum(bool(re.search(refusal, str(each))) for each in found) == 5
    RunFolder(tmp_path / "run").open()  # the winner died holding it


def test_C11_a_lock_deleted_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between another's opening and locking of the file, its holder lets go: no two may hold the folder."""
    first, second, third = (RunFolder(tmp_path / "run") for _ in range(3))
    first.open()
    flock = fcntl.flock

    def late(*arguments: Any) -> None:
        first.lock.release()
        flock(*arguments)

    monkeypatch.setattr(fcntl, "flock", late)
    second.open()
    monkeypatch.undo()
    with pytest.raises(OSError, match=f"{socket.gethostname()}:{os.getpid()}"):
        third.open()


def test_C11_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    RunFolder(tmp_path / "run").open()
    assert "cannot be locked (No locks available): make sure only one run writes there" in caplog.text


def test_C12_the_values_of_the_moment(tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the writer waits, training goes on in the same tensors."""
    extra = ["train.async_checkpoint=true", "train.max_steps=9", "diffusion.timestep_sampler=loss_aware"]
    trainer = make([*tiny, *extra])
    trainer.parallel_model = trainer.state.model
    batches = trainer.run.batches(trainer.state.samples_seen)
    for _ in range(2):
        trainer.launch_step(next(batches))
    go = threading.Event()
    save = ckpt.save_file

    def waiting(*arguments: Any) -> None:
        assert go.wait(20)
        save(*arguments)

    monkeypatch.setattr(ckpt, "save_file", waiting)
    expected = copy.deepcopy(trainer.state_dict().groups)
    trainer.run.save(trainer.state)
    for _ in range(2):
        trainer.launch_step(next(batches))
    go.set()
    trainer.run.writer.wait()
    assert trainer.run.writer.failure is None
    loaded = ckpt.load_checkpoint(trainer.run.folder.checkpoints / "step-0000002")
    assert (loaded.step, loaded.samples_seen) == (2, 4)
    for name, tensors in expected.items():
        assert same_tensors(loaded.groups[name], tensors), name
    changed = trainer.state_dict()
    assert not torch.equal(changed.optim["step/final_layer.linear.bias"], loaded.optim["step/final_layer.linear.bias"])


def unknown_space(patch: pytest.MonkeyPatch) -> None:
    """Once there is a checkpoint, the system no longer says how much space is free."""
    inner = shutil.disk_usage

    def usage(place: Path) -> Any:
        if (place / "latest").exists():
            raise OSError("the disk does not answer")
        return inner(place)

    patch.setattr(shutil, "disk_usage", usage)


@pytest.mark.parametrize(
    ("steps", "disk", "said"),
    [
        (500, partial(full_disk_at, n=8, kind=OSError), "No space left"),
        (6, partial(full_disk_at, n=8, kind=OSError), "No space left"),  # the last step: no boundary follows
        (500, unknown_space, r"does not answer \(it takes .*, an unknown amount .* free\)"),
    ],
)
def test_C13_the_next_boundary_raises(
    tiny: list[str], monkeypatch: pytest.MonkeyPatch, steps: int, disk: Callable[..., None], said: str
) -> None:
    """Wherever in the thread it fails; on two ranks: test_C1_C13_all_ranks_learn_of_it."""
    trainer = make([*tiny, "train.async_checkpoint=true", f"train.max_steps={steps}", "train.checkpoint_every=3"])
    disk(monkeypatch)
    save = ckpt.CheckpointWriter.save
    monkeypatch.setattr(ckpt.CheckpointWriter, "save", lambda self, saved: (save(self, saved), self.wait()))
    with pytest.raises(CheckpointNotWritten, match=rf"step 6 .*{said}"):
        trainer.fit()
    assert trainer.state.step == 6  # the step that found it was not made
    assert not (trainer.run.folder.path / "COMPLETED").exists()
    monkeypatch.undo()
    assert assert_sound(trainer.run.folder.checkpoints).name == "step-0000003"


def test_C13_behind_another_error(tiny: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """An error of the training itself comes first, and the writer's is printed nevertheless."""
    full_disk_at(monkeypatch, 0, OSError)
    trainer = make([*tiny, "train.async_checkpoint=true", "train.checkpoint_every=2"])
    step = trainer.launch_step

    def broken(*arguments: Any) -> Any:
        if trainer.state.step == 2:
            raise ValueError("the training is broken")
        return step(*arguments)

    monkeypatch.setattr(trainer, "launch_step", broken)
    with pytest.raises(ValueError, match="the training is broken"):
        trainer.fit()
    assert re.search(r"warning: the checkpoint of step 2 .*No space left", capsys.readouterr().err)


@pytest.fixture
def official(stopped: Callable[..., Trainer], tmp_path: Path) -> Callable[[Any], Trainer]:
    """A new run whose initial weights are in a .pt file with the given content."""

    def start(content: Any) -> Trainer:
        path = tmp_path / "0000100.pt"
        torch.save(content, path)
        return stopped(f"train.init_from={path}", f"train.output_dir={tmp_path / 'new'}")

    return start


def weights_of(finished: Path, kind: str = "model") -> dict[str, torch.Tensor]:
    return load_file(finished / "checkpoints" / "step-0000003" / f"{kind}.safetensors")


def test_C14_an_official_file_without_an_average(
    official: Callable[[Any], Trainer], finished: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its `model`, written by DDP, starts both, with a warning; other layouts are in test_models_convert.py."""
    raw = weights_of(finished)
    trainer = official({"model": {f"module.{key}": value for key, value in raw.items()}, "train_steps": 100})
    restore(trainer)
    assert same_tensors(clones(trainer.state.model), raw) and same_tensors(clones(trainer.state.ema.model), raw)
    assert trainer.state.step == 0 and "holds no `ema` weights; using its `model`" in caplog.text


def test_C14_a_strict_report_and_no_partial_load(official: Callable[[Any], Trainer], finished: Path) -> None:
    weights = weights_of(finished, "ema")
    del weights["blocks.0.mlp.fc1.bias"], weights["blocks.1.mlp.fc1.bias"]
    weights["blocks.0.extra"] = torch.ones(1)
    weights["x_embedder.proj.bias"] = torch.ones(7)
    trainer = official({"ema": {f"module.{key}": value for key, value in weights.items()}})
    before = clones(trainer.state.model)
    with pytest.raises(ValueError) as raised:
        trainer.fit()
    for said in (
        "0000100.pt does not fit the network",
        "missing blocks.{0-1}.mlp.fc1.bias",
        "unexpected blocks.0.extra",
        "misshapen x_embedder.proj.bias: (7,) in the checkpoint, (16,) in the network",
    ):
        assert said in str(raised.value)
    assert all(same_tensors(clones(model), before) for model in (trainer.state.model, trainer.state.ema.model))
    assert not ckpt.list_checkpoints(trainer.run.folder.checkpoints)


def test_C14_a_part_is_taken_of_an_image_network_only(official: Callable[[Any], Trainer], finished: Path) -> None:
    """A file without `temp_embed` is an image network's; the report names each key that is taken, left or kept."""
    weights = weights_of(finished)
    del weights["temp_embed"]
    weights["final_layer.linear.bias"] = torch.ones(7)
    report = "\n".join(restore(official(weights)))
    assert "left in the checkpoint: 1" in report and "temp_embed: an image" in report
    assert "final_layer.linear.bias: (7,) in the checkpoint" in report


@pytest.mark.parametrize("when", ["logged", "saved"])
def test_H12_folders_deleted_during_the_run_are_made_again(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any, capsys: Any, when: str
) -> None:
    """Before the next row of the log or checkpoint, with a warning; the run ends well and can be continued."""
    keys = {"logged": ["train.log_every=1"], "saved": ["train.log_every=20", "train.async_checkpoint=true"]}[when]
    folder = tmp_path / "run"
    at_step = {1: "checkpoints", 3: "metrics.jsonl", 5: "tensorboard", 7: ""}
    honest = Trainer.launch_step

    def deleting(self: Trainer, micro_batches: Any) -> Any:
        gone = at_step.pop(self.state.step + (self.in_flight is not None), None)
        if gone is not None:
            self.run.writer.wait()
            shutil.rmtree(folder / gone) if (folder / gone).is_dir() else (folder / gone).unlink()
        return honest(self, micro_batches)

    monkeypatch.setattr(Trainer, "launch_step", deleting)
    common = [*tiny, *keys, "train.checkpoint_every=2", "train.keep_last=0"]
    run([*common, "train.max_steps=10"])
    said = caplog.text + capsys.readouterr().err
    found = re.findall(r"(\S+(?: and \S+)?)(?: of \S+)? was deleted during the run", said)
    noticed = ("checkpoints", "run", *(("metrics.jsonl", "tensorboard") if when == "logged" else ()))
    assert all(any(each.endswith(place) for each in found) for place in noticed), said
    assert len(found) <= 5, found
    assert [step.name for step in ckpt.list_checkpoints(folder / "checkpoints")] == ["step-0000008", "step-0000010"]
    assert (folder / "COMPLETED").is_file() and list((folder / "tensorboard").iterdir())
    assert run([*common, "train.max_steps=11"]).state.step == 11
