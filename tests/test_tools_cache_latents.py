"""Making a latent cache: killed anywhere and continued, on two ranks, and what is refused."""

import contextlib
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from common import storage
from datasets.latents import LatentCache
from datasets.shards import INDEX
from engine.config import load_config
from engine.distributed import World
from engine.errors import TrainingAborted
from tests.conftest import refuses
from tests.fault_support import ROOT, on_two_ranks, run
from tests.latent_support import Deadly, cache, content, save_codec
from tools import cache_latents
from tools.cache_latents import LatentWriter


class Killed(BaseException): ...


class Dying:
    """Stands for `write_atomically` in a life that ends: at its first file, after it, or before its second."""

    def __init__(self, how: int) -> None:
        self.honest, self.how, self.files = storage.write_atomically, how, 0

    def __call__(self, path: Path, write: Callable[[Path], object], temporary: Path | None = None) -> Path:
        self.files += 1
        if self.how == 0:  # a part of it stays behind
            (path.parent / f".{path.stem}.9{path.suffix}").write_bytes(b"half")
            raise Killed
        if self.files == self.how + 1:
            raise Killed
        return self.honest(path, write)


def patch_encoder(patch: pytest.MonkeyPatch, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Applies `change` to the result of every call of the encoder."""
    honest = LatentWriter.encode_frames
    patch.setattr(LatentWriter, "encode_frames", lambda self, frames: change(honest(self, frames)))


def test_killed_at_any_write_and_continued(tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finished shards are not encoded again; in the end the same bytes, and nothing else."""
    whole = content(cache(tiny, tmp_path / "whole"))
    assert len(whole) == 4  # three shards and the index
    encoded: list[int] = []
    patch_encoder(monkeypatch, lambda latents: (encoded.append(len(latents)), latents)[1])
    made, deaths = tmp_path / "made", 0
    for life in range(100):
        with monkeypatch.context() as patch:
            patch.setattr(storage, "write_atomically", Dying(life % 3))
            try:
                cache(tiny, made)
                break
            except Killed:
                deaths += 1
    assert content(made) == whole and deaths >= 6
    assert sum(encoded) <= 4 * sum(LatentCache.read_index(made)["shards"])
    encoded.clear()
    cache(tiny, made)  # complete: nothing is done
    assert not encoded and content(made) == whole


@pytest.mark.dist
def test_sigkill_of_the_command_line(
    tiny: list[str], frame_folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a loader worker, amid the shards; the same command then makes what an undisturbed one makes."""
    for number in range(40):
        shutil.copytree(frame_folders / "falls" / "clip0", tmp_path / "set" / "a" / f"{number:02d}")
    overrides = [*tiny, f"data.path={tmp_path / 'set'}", "data.num_workers=1", "data.labels=none"]
    out = tmp_path / "made"
    words = [*overrides, "--out", str(out), "--device", "cpu"]
    command = [sys.executable, "-m", "tools.cache_latents", *words]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
    while not list(out.glob("shard-*.json")) and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert list(out.glob("shard-*.json")) and not (out / INDEX).exists()
    refuses(r"is not a finished cache.*again if it was interrupted", LatentCache, out)
    assert cache_latents.main(words) in (0, None) and "shards are done" in capsys.readouterr().out
    LatentWriter(load_config(None, overrides), tmp_path / "whole", "fp32", 64 * 10**6, World()).write()
    assert content(out) == content(tmp_path / "whole")


@pytest.mark.dist
def test_the_file_is_named_when_a_worker_dies(tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.clips.Pixels", Deadly)
    with pytest.raises(TrainingAborted, match=r"a data loader worker died while it read .*rises/clip1: "):
        cache([*tiny, "data.num_workers=1"], tmp_path / "made")


def test_the_first_clips_of_a_run_are_those_of_its_cache(tiny: list[str], frame_folders: Path, tmp_path: Path) -> None:
    """data.max_clips passes over folders that are too short for a window."""
    root = shutil.copytree(frame_folders, tmp_path / "set")
    for file in sorted((root / "falls" / "clip0").iterdir())[2:]:
        file.unlink()
    overrides = [*tiny, f"data.path={root}", "data.max_clips=4", "train.max_steps=1"]
    run([*overrides, f"data.latents={cache(overrides, tmp_path / 'made')}"])


def make_on_rank(world: World, overrides: list[str], out: Path) -> None:
    cache(overrides, out, world=world)


@pytest.mark.dist
def test_two_ranks_make_the_same_cache(tiny: list[str], tmp_path: Path) -> None:
    overrides = [*tiny, *save_codec(tmp_path / "codec", "AutoencoderTiny")]
    on_two_ranks(tmp_path, make_on_rank, overrides, tmp_path / "two")
    assert content(tmp_path / "two") == content(cache(overrides, tmp_path / "one"))


@pytest.mark.parametrize("finished", [True, False])
def test_another_cache_is_not_overwritten(
    tiny: list[str], tmp_path: Path, finished: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken, contextlib.suppress(Killed):
        if not finished:
            broken.setattr(storage, "write_atomically", Dying(2))
        cache(tiny, tmp_path / "made")
    assert (tmp_path / "made" / INDEX).exists() == finished
    before = content(tmp_path / "made")
    for extra, dtype, named in (
        (["data.image_size=4"], "fp32", "settings"),
        (["data.max_clips=5"], "fp32", "data"),
        (save_codec(tmp_path / "codec", "AutoencoderTiny"), "fp32", "codec"),
        ([], "bf16", "dtype"),
    ):
        sentence = rf"--out .*made holds another cache \(.*{named}: .*name a new folder"
        refuses(sentence, cache, [*tiny, *extra], tmp_path / "made", dtype)
    assert content(tmp_path / "made") == before


def test_a_disk_that_is_too_small_is_refused_before_encoding(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    refuses(r"made has 0\.000 GB free, but the cache needs 0\.000 GB: make room", cache, tiny, tmp_path / "made")
    assert "6 clips, 42 frames: latents of 1x3x8x8 in fp32" in capsys.readouterr().out
    assert not list((tmp_path / "made").glob("shard*"))


def test_values_beyond_the_number_format(tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patch_encoder(monkeypatch, lambda latents: latents * 1e5)
    with pytest.raises(ValueError, match=r"latents of 'falls/clip0' are not finite in fp16: choose another --dtype"):
        cache(tiny, tmp_path / "made", "fp16")
    assert cache(tiny, tmp_path / "wide", "bf16")


def test_folders_and_settings_that_are_refused(tiny: list[str], tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    refuses(r"full holds 'mine\.txt', which is not part of a cache", cache, tiny, tmp_path / "full")
    refuses(r"mine\.txt is a file", cache, tiny, tmp_path / "full" / "mine.txt")
    assert content(tmp_path / "full") == {"mine.txt": b"x"}

    (tmp_path / "made").mkdir()
    lock = storage.FolderLock(tmp_path / "made", "--out")
    lock.take()
    refuses(r"--out=.*made is being written by", cache, tiny, tmp_path / "made")
    lock.release()
    made = cache(tiny, tmp_path / "made")

    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.mp4").write_text("no video " * 30)
    with pytest.raises(ValueError, match=r"a\.mp4: is not a video.*no other clip can be used either"):
        cache([*tiny, f"data.path={tmp_path / 'set'}", "data.labels=none"], tmp_path / "new")
    refuses(r"data\.latents must not be set", cache, [*tiny, f"data.latents={made}"], tmp_path / "new")
    refuses(r"--shard_mb 0 must be at least 1", cache_latents.main, ["--out", str(tmp_path / "x"), "--shard_mb", "0"])
