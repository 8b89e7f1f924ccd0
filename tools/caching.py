"""Making a latent cache: measure the clips, plan the shards, encode each shard, write the index.

A shard is whole under its name or not there, and counts once its record `shard-00000.json` is; so whatever is killed,
the same call goes on after the last whole shard. `plan.json` and the records go when `index.json` comes.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from tqdm import tqdm

from common.storage import FolderLock, write_atomically
from datasets import Clip, VideoError, build_dataset
from datasets.catalog import digest_of
from datasets.clips import Pixels, reason_of
from datasets.latents import FORMAT, INDEX, TENSOR, LatentCache, Run, StoredClip, read_index
from datasets.readers import Reader
from datasets.shards import DTYPES, shard_file, write_shard
from engine.config import Config
from engine.distributed import World, broadcast_object, gather_objects, on_main
from engine.errors import TrainingAborted
from engine.stream import loaded_items, worker_loader
from engine.watch import Breadcrumbs
from models.autoencoder import LatentCodec
from models.identity import codec_identity, is_same_codec

PLAN = "plan.json"
PIECE_BYTES = 2**26  # decoded frames that a loader worker hands over at a time
LEAST_SHARDS = 64  # of a small set: what is lost by a kill stays small, and ranks have something to share
LEFT_BY_A_KILL = (".shard-*", ".captions.*", f".{PLAN[:-5]}.*", f".{INDEX[:-5]}.*")  # what `write_atomically` had begun


@dataclass(frozen=True)
class Job:
    """What is to be cached, the same on every rank.

    identity: what the cache is of and in; a cache is continued only by the same.
    """

    clips: list[Clip]
    listed: int  # how many at the end of `clips` are images of data.frame_list
    source: Pixels
    identity: dict[str, Any]
    workers: int
    strict: bool
    crumbs: Breadcrumbs

    def open(self, clip: Clip) -> Reader:
        """Its reader; should the process that opens it die, what it read is known."""
        if self.workers:
            self.crumbs(clip.path)
        return self.source.open(clip)

    @property
    def shape(self) -> tuple[int, ...]:
        """(V, P, C, h, w) of one frame."""
        return tuple(self.identity["shape"])

    @property
    def row_bytes(self) -> int:
        """Bytes of one frame."""
        return math.prod(self.shape) * DTYPES[self.identity["dtype"]].torch.itemsize


def cache_latents(config: Config, out: Path, dtype: str, shard_bytes: int, world: World) -> None:
    """Encode all clips of `config.data` by `config.codec` into the folder `out`; collective.

    Raises: ValueError, OSError where `out` is something else or too small, or the data or codec is unusable.
    """
    codec = LatentCodec.from_config(config.codec, world.device)
    job = make_job(config, codec, dtype, Breadcrumbs(out, world.rank))
    with locked(out, world):
        if on_main(lambda: finished(out, job)):
            tell(world, f"{out} is complete already")
            return
        plan = planned(out, job, shard_bytes, world)
        on_main(lambda: check_room(out, job, plan))
        encode_shards(out, job, plan, codec, world)
        gather_objects(None)  # all shards are there
        index = on_main(lambda: finish(out, job, plan))
    tell(world, summary(out, index))


def make_job(config: Config, codec: LatentCodec, dtype: str, crumbs: Breadcrumbs) -> Job:
    """The clips that any window could be drawn from, and what their latents depend on."""
    if config.data.latents is not None:
        raise ValueError("data.latents is what this makes: leave it out")
    # clips for windows of any length, and those that are held out; or, of a run on the first n, these
    every = replace(config.data, num_frames=1, frame_interval=1, val_path=None, val_share=0.0, max_clips=None)
    few = config.data.max_clips is not None and not config.data.val_share
    dataset = build_dataset(config.data if few else every, seed=0)
    source = cast(Pixels, dataset.source)
    side = config.data.image_size // config.codec.downsample_factor
    images = dataset.images or []
    unique = list({clip.name: clip for clip in images}.values())
    clips = [*{clip.name: clip for clip in dataset.catalog.clips}.values(), *unique]  # a clip may have many captions
    identity = {
        "format": FORMAT,
        "codec": codec_identity(config.codec),
        "settings": dataset.latent_settings,
        "data": digest_of(clips, []),
        "dtype": dtype,
        "shape": [1 + dataset.flips, 1 + codec.stochastic, config.codec.latent_channels, side, side],
    }
    return Job(clips, len(unique), source, identity, config.data.num_workers, config.data.strict, crumbs)


def tell(world: World, text: str) -> None:
    """Print on one rank."""
    if world.is_main:
        print(text, flush=True)


def progress(what: str, unit: str, total: int, world: World) -> Any:
    """A bar, with the time left, over rank 0's share; a log file gets a line now and then."""
    interval = 0.1 if sys.stderr.isatty() else 30.0  # seconds
    whose = what if world.size == 1 else f"{what} (share of rank 0 of {world.size})"
    return tqdm(desc=whose, unit=unit, total=total, mininterval=interval, dynamic_ncols=True, disable=not world.is_main)


# ------------------------------------------------------------------------------------------- the folder


@contextmanager
def locked(out: Path, world: World) -> Iterator[None]:
    """`out`, made if need be, held by this call alone and cleared of what a killed one had begun.

    Raises: OSError, ValueError where it is another's, or holds something else.
    """
    lock = FolderLock(out, "--out")
    on_main(lambda: _take(out, lock))
    try:
        yield
    finally:
        lock.release()


def _take(out: Path, lock: FolderLock) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; name a folder")
    held = sorted(file.name for file in out.iterdir()) if out.exists() else []
    strangers = [name for name in held if not any(fnmatch(name, each) for each in (".lock", *LEFT_BY_A_KILL))]
    if strangers and not {PLAN, INDEX} & set(held):
        raise ValueError(f"--out {out} holds {strangers[0]!r}, which is not of a cache; name a new folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock.take()
    except OSError as error:
        raise OSError(f"--out {out} cannot be written: {error.strerror}" if error.errno else str(error)) from None
    for pattern in LEFT_BY_A_KILL:
        for file in out.glob(pattern):
            file.unlink()


def check_same(out: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """ValueError unless the cache in `out` is of what is now asked for."""
    differing = [key for key in now if before.get(key) != now[key]]
    if "codec" in differing and isinstance(before.get("codec"), dict) and is_same_codec(before["codec"], now["codec"]):
        differing.remove("codec")
    if differing:
        changes = "; ".join(f"{key}: {before.get(key)} -> {now[key]}" for key in differing)
        raise ValueError(f"--out {out} holds another cache ({changes}); name a new folder")


def finished(out: Path, job: Job) -> bool:
    """Whether `out` already holds the whole cache; ValueError if it holds another."""
    if not (out / INDEX).exists():
        return False
    check_same(out, read_index(out), job.identity)
    LatentCache(out)  # its shards are as it says
    clear_workings(out)
    return True


def clear_workings(out: Path) -> None:
    """Delete what only the making needed."""
    for file in [out / PLAN, *out.glob("shard-*.json")]:
        file.unlink(missing_ok=True)


def write_json(file: Path, content: Any) -> None:
    """`content` in `file`, whole or not at all."""
    write_atomically(file, lambda temporary: temporary.write_text(json.dumps(content), encoding="utf-8"))


# --------------------------------------------------------------------------------------------- planning


class Measured:
    """`measured[i]`: clip i as it will be stored, but for its place; opened, not decoded."""

    def __init__(self, job: Job, numbers: Sequence[int]) -> None:
        self.job, self.numbers = job, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: int) -> StoredClip:
        number = self.numbers[place]
        clip = self.job.clips[number]
        listed = number >= len(self.job.clips) - self.job.listed
        stored = StoredClip(clip.name, clip.size, clip.num_frames, listed=listed)
        try:
            reader = self.job.open(clip)
        except VideoError as error:
            return replace(stored, reason=reason_of(error, clip))
        return replace(stored, frames=len(reader), cut_off=reader.cut_off)


def planned(out: Path, job: Job, shard_bytes: int, world: World) -> list[StoredClip]:
    """Every clip with its length and place: of the plan in `out`, or measured now; the same on every rank."""
    before = on_main(lambda: read_plan(out))
    if before is None:
        share = list(range(world.rank, len(job.clips), world.size))
        with progress("measuring", "clip", len(share), world) as bar:
            found = []
            for clip in loaded(Measured(job, share)):
                found.append(clip)
                bar.update()
        shares = gather_objects(found)
        stored = [shares[number % world.size][number // world.size] for number in range(len(job.clips))]
        check_usable(job, stored)
        most = min(shard_bytes // job.row_bytes, sum(clip.frames for clip in stored) // LEAST_SHARDS)
        clips = [clip.to_json() for clip in placed(stored, most)]
        before = {"identity": job.identity, "clips": clips}
        on_main(lambda: write_json(out / PLAN, before))
    before = broadcast_object(before)
    check_same(out, before["identity"], job.identity)
    return [StoredClip.from_json(facts) for facts in before["clips"]]


def read_plan(out: Path) -> dict[str, Any] | None:
    """The plan in `out`, or None; ValueError where it cannot be read."""
    if not (out / PLAN).exists():
        return None
    try:
        plan = json.loads((out / PLAN).read_text(encoding="utf-8"))
        return {"identity": dict(plan["identity"]), "clips": list(plan["clips"])}
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        raise ValueError(f"{out / PLAN} cannot be read; delete {out} and begin anew") from None


def check_usable(job: Job, stored: Sequence[StoredClip]) -> None:
    """VideoError with data.strict at the first clip that lacks something; or where none is usable."""
    for clip, found in zip(job.clips, stored, strict=True):
        reason = found.reason or found.cut_off
        if reason and job.strict:
            raise VideoError(clip.path, reason)
    if not any(found.frames for found in stored):
        raise VideoError(job.clips[0].path, f"{stored[0].reason}; and none of the other clips can be used")


def placed(clips: Iterable[StoredClip], shard_frames: int) -> Iterator[StoredClip]:
    """The clips in their order, laid one after another into shards of at most `shard_frames`, or of one clip."""
    shard = filled = 0
    for clip in clips:
        if clip.frames and filled and filled + clip.frames > shard_frames:
            shard, filled = shard + 1, 0
        yield replace(clip, shard=shard, first=filled)
        filled += clip.frames


def frames_of(plan: Sequence[StoredClip]) -> list[int]:
    """Frames of each shard."""
    counts: dict[int, int] = defaultdict(int)
    for clip in plan:
        counts[clip.shard] += clip.frames
    return [counts[number] for number in range(len(counts))]


def record_file(out: Path, number: int) -> Path:
    """The record of a shard that is done."""
    return shard_file(out, number).with_suffix(".json")


def left_to_do(out: Path, plan: Sequence[StoredClip]) -> list[int]:
    """The shards that are not done."""
    return [number for number in range(len(frames_of(plan))) if not record_file(out, number).exists()]


def check_room(out: Path, job: Job, plan: Sequence[StoredClip]) -> None:
    """Say how large the cache will be; OSError where the disk is too small for what is left to write."""
    frames, left = frames_of(plan), left_to_do(out, plan)
    needed, free = job.row_bytes * sum(frames[number] for number in left), shutil.disk_usage(out).free
    views, parts, *latent = job.shape
    each = f"{'mean and deviation' if parts == 2 else 'mean'}{', and mirrored' if views == 2 else ''}"
    print(
        f"{len(plan)} clips, {sum(frames)} frames: {each}, {'x'.join(map(str, latent))} in {job.identity['dtype']}, "
        f"{gigabytes(job.row_bytes * sum(frames))} in {len(frames)} shards\n"
        f"{len(frames) - len(left)} shards are done; {gigabytes(needed)} to write into {out}, "
        f"{gigabytes(free)} free",
        flush=True,
    )
    if needed > free:
        raise OSError(
            f"--out {out} has {gigabytes(free)} free, and the cache takes {gigabytes(needed)}: make room, or halve it "
            "with --dtype fp16"
        )


def gigabytes(count: float) -> str:
    """Bytes in words."""
    return f"{count / 1e9:.3f} GB"


# --------------------------------------------------------------------------------------------- encoding


class Pieces:
    """`pieces[i]`: decoded frames (T, V, 3, H, W) in [-1, 1] of the i-th piece, and what they are like."""

    def __init__(self, job: Job, plan: Sequence[StoredClip], pieces: Sequence[tuple[int, range]]) -> None:
        self.job, self.plan, self.pieces = job, plan, pieces

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, place: int) -> tuple[Tensor, list[Run]]:
        number, indices = self.pieces[place]
        try:
            return self._read(number, list(indices))
        except VideoError:  # some of the frames: each for itself
            found = [self._one(number, index) for index in indices]
        return torch.cat([frame for frame, _ in found]), merged(run for _, runs in found for run in runs)

    def _one(self, number: int, index: int) -> tuple[Tensor, list[Run]]:
        try:
            return self._read(number, [index])
        except VideoError as error:
            side = self.job.source.config.image_size
            nothing = torch.zeros(1, self.job.shape[0], 3, side, side)
            return nothing, [Run(1, 0, 0, reason_of(error, self.job.clips[number]))]

    def _read(self, number: int, indices: list[int]) -> tuple[Tensor, list[Run]]:
        clip = self.job.clips[number]
        reader = self.job.open(clip)
        if len(reader) != self.plan[number].frames:
            raise VideoError(clip.path, f"has changed: {self.plan[number].frames} frames then, {len(reader)} now")
        frames = self.job.source.read(reader, clip, indices)
        return self._views(frames), [Run(len(indices), *frames.shape[-2:])]

    def _views(self, frames: Tensor) -> Tensor:
        """uint8 (T, C, H, W) -> (T, V, 3, size, size)."""
        return torch.stack([self.job.source.finish(frames, bool(view)) for view in range(self.job.shape[0])], dim=1)


def merged(runs: Iterable[Run]) -> list[Run]:
    """Neighbours that are alike as one."""
    groups = groupby(runs, key=lambda run: run[1:])
    return [Run(sum(run.frames for run in group), *like) for like, group in groups]


def pieces_of(job: Job, plan: Sequence[StoredClip], number: int) -> list[tuple[int, range]]:
    """The clips of a shard, cut into pieces of about PIECE_BYTES: (clip, its frames)."""
    side = job.source.config.image_size
    size = max(16, PIECE_BYTES // (job.shape[0] * 12 * side * side) // 16 * 16)  # 16: what most codecs are given
    return [
        (place, range(first, min(first + size, clip.frames)))
        for place, clip in enumerate(plan)
        if clip.shard == number
        for first in range(0, clip.frames, size)
    ]


def loaded(items: Measured | Pieces) -> Iterator[Any]:
    """The items in order, made by worker processes, which end with this one.

    Raises: TrainingAborted where one died, with the file that it read.
    """
    job = items.job
    job.crumbs.clear()
    loader = worker_loader(items, job.workers, prefetch_factor=2, batch_size=None, collate_fn=as_it_is)  # type: ignore[arg-type]
    try:
        yield from loaded_items(loader, timeout_s=math.inf)
    except RuntimeError as error:
        explained = job.crumbs.explain(error)
        if explained is None:
            raise
        raise TrainingAborted(explained) from error
    finally:
        job.crumbs.clear()


def as_it_is(item: Any) -> Any:
    """In place of torch's conversion."""
    return item


def encode_shards(out: Path, job: Job, plan: Sequence[StoredClip], codec: LatentCodec, world: World) -> None:
    """Write this rank's share of the shards that are not done."""
    frames = frames_of(plan)
    share = broadcast_object(left_to_do(out, plan))[world.rank :: world.size]
    pieces = {number: pieces_of(job, plan, number) for number in share}
    stream = loaded(Pieces(job, plan, [piece for number in share for piece in pieces[number]]))
    with progress("encoding", "frame", sum(frames[number] for number in share), world) as bar:
        for number in share:
            encoder = ShardEncoder(codec, job, plan, bar)
            rows = encoder.rows(pieces[number], islice(stream, len(pieces[number])))
            shape = (frames[number], *job.shape)
            write = partial(
                write_shard, dtype=job.identity["dtype"], shape=shape, rows=rows, name=TENSOR, format=FORMAT
            )
            write_atomically(shard_file(out, number), write)
            write_json(record_file(out, number), encoder.record())


class ShardEncoder:
    """Encodes the pieces of one shard; remembers what its frames are like and what the number format cost."""

    def __init__(self, codec: LatentCodec, job: Job, plan: Sequence[StoredClip], bar: Any) -> None:
        self.codec, self.job, self.plan, self.bar = codec, job, plan, bar
        self.runs: dict[int, list[Run]] = defaultdict(list)
        self.largest, self.squares, self.error_squares = 0.0, 0.0, 0.0

    def rows(self, pieces: Sequence[tuple[int, range]], loaded: Iterable[tuple[Tensor, list[Run]]]) -> Iterator[Tensor]:
        """Latents (T, V, P, C, h, w) of each piece, in the cache's number format.

        Raises: ValueError where they are not finite; VideoError, with data.strict, at a frame that cannot be used.
        """
        for (number, _), (frames, runs) in zip(pieces, loaded, strict=True):
            for run in runs if self.job.strict else ():
                if run.reason:
                    raise VideoError(self.job.clips[number].path, run.reason)
            exact = self.encode(frames)
            stored = exact.to(DTYPES[self.job.identity["dtype"]].torch)
            if not stored.isfinite().all():
                raise ValueError(
                    f"latents of {self.plan[number].name!r} are not finite in {self.job.identity['dtype']}: choose "
                    "another --dtype, or codec.dtype=fp32"
                )
            self.note_error(exact, stored)
            self.runs[number] += runs
            self.bar.update(len(frames))
            yield stored

    def encode(self, frames: Tensor) -> Tensor:
        """(T, V, 3, H, W) -> (T, V, P, C, h, w), fp32: each view as a clip of its own.

        Always in whole chunks, as in training: for another batch size kernels may add up in another order.
        """
        lacking = -len(frames) % self.codec.config.chunk_size
        whole = torch.cat([frames, frames[-1:].expand(lacking, *frames.shape[1:])])
        views = [self.codec.posterior(view[None].to(self.codec_device)) for view in whole.unbind(1)]
        parts = [torch.stack([part for part in view if part is not None], dim=2)[0] for view in views]
        return torch.stack(parts, dim=1)[: len(frames)]

    @property
    def codec_device(self) -> torch.device:
        """Where the codec computes; the CPU for pixel space, which has no weights."""
        return next((value.device for value in self.codec.parameters()), torch.device("cpu"))

    def note_error(self, exact: Tensor, stored: Tensor) -> None:
        """What is lost of each value, largest and in the mean square."""
        error = stored.float() - exact
        self.largest = max(self.largest, float(error.abs().max()))
        self.squares += float(exact.double().square().sum())
        self.error_squares += float(error.double().square().sum())

    def record(self) -> dict[str, Any]:
        """What the index must know of the shard."""
        runs = {str(number): [list(run) for run in merged(found)] for number, found in self.runs.items()}
        return {"runs": runs, "errors": [self.largest, self.squares, self.error_squares]}


# -------------------------------------------------------------------------------------------- the index


def finish(out: Path, job: Job, plan: Sequence[StoredClip]) -> dict[str, Any]:
    """Write the index of a cache whose shards are all done, and delete what only the making needed."""
    frames = frames_of(plan)
    records = [json.loads(record_file(out, number).read_text(encoding="utf-8")) for number in range(len(frames))]
    runs = {int(number): found for record in records for number, found in record["runs"].items()}
    clips = [{**clip.to_json(), "runs": runs.get(number, [])} for number, clip in enumerate(plan)]
    largest, squares, lost = (list(column) for column in zip(*(record["errors"] for record in records), strict=True))
    error = {"largest": max(largest), "relative_rms": math.sqrt(sum(lost) / max(sum(squares), 1e-300))}
    index = {**job.identity, "rounding": error, "shards": frames, "clips": clips}
    write_json(out / INDEX, index)
    clear_workings(out)
    return index


def unusable(index: dict[str, Any]) -> dict[str, str]:
    """Clips with frames that cannot be used, and why."""
    reasons = {clip["name"]: [clip.get("reason"), *(run[3] for run in clip["runs"])] for clip in index["clips"]}
    return {name: next(filter(None, found)) for name, found in reasons.items() if any(found)}


def summary(out: Path, index: dict[str, Any]) -> str:
    """What was made, in a few lines."""
    rounding, bad = index["rounding"], unusable(index)
    lines = [f"{len(index['clips'])} clips, {sum(index['shards'])} frames in {out}: train with data.latents={out}"]
    if rounding["largest"]:
        lines.append(
            f"{index['dtype']} costs at most {rounding['largest']:.2g} of a value, {rounding['relative_rms']:.2g} of "
            "their root mean square"
        )
    lines += [f"{len(bad)} clips have frames that cannot be used; training replaces them:"] if bad else []
    lines += [f"  {name}: {reason}" for name, reason in islice(bad.items(), 10)]
    return "\n".join(lines)
