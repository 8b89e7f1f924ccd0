"""Makes a latent cache: measures the clips, plans the shards, encodes each shard, writes the index."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.storage import free_bytes
from common.text import gigabytes
from datasets import VideoError
from datasets.clips import describe_failure
from datasets.latents import FORMAT, TENSOR, FrameRun, LatentCache, StoredClip, read_index
from datasets.shards import NUMBER_FORMATS
from engine.config import Config
from engine.distributed import World, broadcast_object, gather_objects, on_main
from engine.stream import Breadcrumbs
from models.autoencoder import LatentCodec

from .job import Job, load_items, make_job
from .writer import CacheWriter, write_cache

PIECE_BYTES = 2**26  # size of the decoded frames that a loader worker hands over at a time
LEAST_SHARDS = 64  # of a small set, so that a kill loses little and ranks can share the work


def cache_latents(config: Config, out: Path, dtype: str, shard_bytes: int, world: World) -> None:
    """Encodes all clips of `config.data` by `config.codec` into the folder `out`; collective.

    Raises: ValueError, OSError where `out` holds something else or is too small, or the data or codec is unusable.
    """
    codec = LatentCodec.from_config(config.codec, world.device)
    job = make_job(config, codec, dtype, Breadcrumbs(out, world.rank))
    write_cache(out, Latents(job, codec, shard_bytes), world)


class Latents:
    """The latents of a job, as `Contents` of a cache."""

    def __init__(self, job: Job, codec: LatentCodec, shard_bytes: int) -> None:
        self.job, self.codec, self.shard_bytes = job, codec, shard_bytes
        self.identity = job.identity
        self.plan: list[StoredClip] = []

    def read_finished(self, out: Path) -> dict[str, Any]:
        """Returns the identity of the finished cache in `out`."""
        index = read_index(out)
        LatentCache(out)  # checks the shards
        return index

    def encode(self, writer: CacheWriter) -> None:
        """Writes the plan and this rank's missing shards; collective."""
        self.plan = make_plan(writer, self.job, self.shard_bytes)
        on_main(lambda: check_room(writer, self.job, self.plan))
        encode_shards(writer, self.job, self.plan, self.codec)

    def finish(self, writer: CacheWriter) -> str:
        """Writes the index; returns a summary."""
        return summarize(writer.out, write_index(writer, self.job, self.plan))


# ---- planning ----------------------------------------------------------------------------------------


class Measured:
    """Items `StoredClip` without a place: clips are opened to read their length, not decoded."""

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
            return replace(stored, reason=describe_failure(error, clip))
        return replace(stored, frames=len(reader), cut_off=reader.cut_off)


def make_plan(writer: CacheWriter, job: Job, shard_bytes: int) -> list[StoredClip]:
    """Returns every clip with its length and place, from plan.json or measured now; the same on every rank."""
    before = on_main(lambda: writer.read_plan(lambda plan: (dict(plan["identity"]), list(plan["clips"]))))
    if before is None:
        stored = measure_clips(writer, job)
        check_usable(job, stored)
        most = min(shard_bytes // job.row_bytes, sum(clip.frames for clip in stored) // LEAST_SHARDS)
        before = job.identity, [clip.to_json() for clip in place_clips(stored, most)]
        plan = {"identity": before[0], "clips": before[1]}
        on_main(lambda: writer.write_plan(plan))
    identity, clips = broadcast_object(before)
    writer.check_identity(identity)
    return [StoredClip.from_json(facts) for facts in clips]


def measure_clips(writer: CacheWriter, job: Job) -> list[StoredClip]:
    """Returns every clip with its length, each rank measuring a share; collective."""
    rank, size = writer.world.rank, writer.world.size
    share, found = list(range(rank, len(job.clips), size)), []
    with writer.progress("measuring", "clip", len(share)) as bar:
        for clip in load_items(Measured(job, share), job):
            found.append(clip)
            bar.update()
    shares = gather_objects(found)
    return [shares[number % size][number // size] for number in range(len(job.clips))]


def check_usable(job: Job, stored: Sequence[StoredClip]) -> None:
    """Raises VideoError where no clip is usable or, with data.strict, where any clip is not."""
    for clip, found in zip(job.clips, stored, strict=True):
        reason = found.reason or found.cut_off
        if reason and job.strict:
            raise VideoError(clip.path, reason)
    if not any(found.frames for found in stored):
        raise VideoError(job.clips[0].path, f"{stored[0].reason}; and none of the other clips can be used")


def place_clips(clips: Iterable[StoredClip], shard_frames: int) -> Iterator[StoredClip]:
    """Yields the clips in order, with their places in shards of at most `shard_frames` frames or of one clip."""
    shard = filled = 0
    for clip in clips:
        if clip.frames and filled and filled + clip.frames > shard_frames:
            shard, filled = shard + 1, 0
        yield replace(clip, shard=shard, first=filled)
        filled += clip.frames


def count_frames(plan: Sequence[StoredClip]) -> list[int]:
    """Returns the number of frames of each shard."""
    counts: dict[int, int] = defaultdict(int)
    for clip in plan:
        counts[clip.shard] += clip.frames
    return [counts[number] for number in range(len(counts))]


def check_room(writer: CacheWriter, job: Job, plan: Sequence[StoredClip]) -> None:
    """Prints the size of the cache. Raises: OSError where the disk is too small for the missing shards."""
    frames = count_frames(plan)
    missing, out = writer.find_missing(len(frames)), writer.out
    needed, free = job.row_bytes * sum(frames[number] for number in missing), free_bytes(out)
    views, parts, *latent = job.shape
    each = f"{'mean and deviation' if parts == 2 else 'mean'}{', and mirrored' if views == 2 else ''}"
    print(
        f"{len(plan)} clips, {sum(frames)} frames: {each}, {'x'.join(map(str, latent))} in {job.identity['dtype']}, "
        f"{gigabytes(job.row_bytes * sum(frames))} in {len(frames)} shards\n"
        f"{len(frames) - len(missing)} shards are done; {gigabytes(needed)} to write into {out}, "
        f"{gigabytes(free)} free",
        flush=True,
    )
    if needed > free:
        raise OSError(
            f"--out {out} has {gigabytes(free)} free, and the cache takes {gigabytes(needed)}: make room, or halve it "
            "with --dtype fp16"
        )


# ---- encoding ---------------------------------------------------------------------------------------


class Pieces:
    """Items (decoded frames (T, V, 3, H, W) in [-1, 1], their runs), one for each of `pieces`."""

    def __init__(self, job: Job, plan: Sequence[StoredClip], pieces: Sequence[tuple[int, range]]) -> None:
        self.job, self.plan, self.pieces = job, plan, pieces

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, place: int) -> tuple[Tensor, list[FrameRun]]:
        number, indices = self.pieces[place]
        try:
            return self._read(number, list(indices))
        except VideoError:  # some frames are unusable: read them one by one
            found = [self._one(number, index) for index in indices]
        return torch.cat([frame for frame, _ in found]), merge_runs(run for _, runs in found for run in runs)

    def _one(self, number: int, index: int) -> tuple[Tensor, list[FrameRun]]:
        try:
            return self._read(number, [index])
        except VideoError as error:
            side = self.job.source.config.image_size
            nothing = torch.zeros(1, self.job.shape[0], 3, side, side)
            return nothing, [FrameRun(1, 0, 0, describe_failure(error, self.job.clips[number]))]

    def _read(self, number: int, indices: list[int]) -> tuple[Tensor, list[FrameRun]]:
        clip = self.job.clips[number]
        reader = self.job.open(clip)
        if len(reader) != self.plan[number].frames:
            raise VideoError(clip.path, f"has changed: {self.plan[number].frames} frames then, {len(reader)} now")
        frames = self.job.source.read(reader, clip, indices)
        return self._views(frames), [FrameRun(len(indices), *frames.shape[-2:])]

    def _views(self, frames: Tensor) -> Tensor:
        """Transforms uint8 (T, C, H, W) to the views (T, V, 3, size, size)."""
        return torch.stack([self.job.source.finish(frames, bool(view)) for view in range(self.job.shape[0])], dim=1)


def merge_runs(runs: Iterable[FrameRun]) -> list[FrameRun]:
    """Returns the runs with adjacent equal ones joined."""
    groups = groupby(runs, key=lambda run: run[1:])
    return [FrameRun(sum(run.frames for run in group), *like) for like, group in groups]


def cut_pieces(job: Job, plan: Sequence[StoredClip], number: int) -> list[tuple[int, range]]:
    """Returns the clips of a shard, cut into pieces of about PIECE_BYTES: (clip, range of its frames)."""
    side = job.source.config.image_size
    size = max(16, PIECE_BYTES // (job.shape[0] * 12 * side * side) // 16 * 16)  # 16: the usual chunk size
    return [
        (place, range(first, min(first + size, clip.frames)))
        for place, clip in enumerate(plan)
        if clip.shard == number
        for first in range(0, clip.frames, size)
    ]


def encode_shards(writer: CacheWriter, job: Job, plan: Sequence[StoredClip], codec: LatentCodec) -> None:
    """Writes this rank's share of the missing shards; collective."""
    frames = count_frames(plan)
    share = writer.assign_shards(len(frames))
    pieces = {number: cut_pieces(job, plan, number) for number in share}
    stream = load_items(Pieces(job, plan, [piece for number in share for piece in pieces[number]]), job)
    with writer.progress("encoding", "frame", sum(frames[number] for number in share)) as bar:
        for number in share:
            encoder = ShardEncoder(codec, job, plan, bar)
            rows = encoder.rows(pieces[number], islice(stream, len(pieces[number])))
            writer.write_shard(number, job.identity["dtype"], (frames[number], *job.shape), rows, TENSOR, FORMAT)
            writer.write_record(number, encoder.record())


class ShardEncoder:
    """Encodes the pieces of one shard; collects the runs of its clips and the rounding error of the number format."""

    def __init__(self, codec: LatentCodec, job: Job, plan: Sequence[StoredClip], bar: Any) -> None:
        self.codec, self.job, self.plan, self.bar = codec, job, plan, bar
        self.runs: dict[int, list[FrameRun]] = defaultdict(list)
        self.largest, self.squares, self.error_squares = 0.0, 0.0, 0.0

    def rows(
        self, pieces: Sequence[tuple[int, range]], loaded: Iterable[tuple[Tensor, list[FrameRun]]]
    ) -> Iterator[Tensor]:
        """Yields the latents (T, V, P, C, h, w) of each piece, in the cache's number format.

        Raises: ValueError where they are not finite; VideoError, with data.strict, at a frame that cannot be used.
        """
        for (number, _), (frames, runs) in zip(pieces, loaded, strict=True):
            for run in runs if self.job.strict else ():
                if run.reason:
                    raise VideoError(self.job.clips[number].path, run.reason)
            exact = self.encode(frames)
            stored = exact.to(NUMBER_FORMATS[self.job.identity["dtype"]].torch)
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
        """Encodes (T, V, 3, H, W) to (T, V, P, C, h, w) in fp32, each view as a separate clip.

        Chunks are padded to full size, as in training: with other batch sizes kernels may sum in another order.
        """
        padding = -len(frames) % self.codec.config.chunk_size
        whole = torch.cat([frames, frames[-1:].expand(padding, *frames.shape[1:])])
        views = [self.codec.posterior(view[None].to(self.codec_device)) for view in whole.unbind(1)]
        parts = [torch.stack([part for part in view if part is not None], dim=2)[0] for view in views]
        return torch.stack(parts, dim=1)[: len(frames)]

    @property
    def codec_device(self) -> torch.device:
        """The device of the codec; the CPU for pixel space, which has no weights."""
        return next((value.device for value in self.codec.parameters()), torch.device("cpu"))

    def note_error(self, exact: Tensor, stored: Tensor) -> None:
        """Updates the largest and the mean square rounding error."""
        error = stored.float() - exact
        self.largest = max(self.largest, float(error.abs().max()))
        self.squares += float(exact.double().square().sum())
        self.error_squares += float(error.double().square().sum())

    def record(self) -> dict[str, Any]:
        """Returns the facts about the shard that the index needs."""
        runs = {str(number): [list(run) for run in merge_runs(found)] for number, found in self.runs.items()}
        return {"runs": runs, "errors": [self.largest, self.squares, self.error_squares]}


# ---- the index --------------------------------------------------------------------------------------


def write_index(writer: CacheWriter, job: Job, plan: Sequence[StoredClip]) -> dict[str, Any]:
    """Writes the index from the records of the shards; returns it."""
    frames = count_frames(plan)
    records = writer.read_records(len(frames))
    runs = {int(number): found for record in records for number, found in record["runs"].items()}
    clips = [{**clip.to_json(), "runs": runs.get(number, [])} for number, clip in enumerate(plan)]
    largest, squares, lost = (list(column) for column in zip(*(record["errors"] for record in records), strict=True))
    error = {"largest": max(largest), "relative_rms": math.sqrt(sum(lost) / max(sum(squares), 1e-300))}
    index = {**job.identity, "rounding": error, "shards": frames, "clips": clips}
    writer.write_index(index)
    return index


def find_unusable(index: dict[str, Any]) -> dict[str, str]:
    """Returns clip -> reason for the clips with unusable frames."""
    reasons = {clip["name"]: [clip.get("reason"), *(run[3] for run in clip["runs"])] for clip in index["clips"]}
    return {name: next(filter(None, found)) for name, found in reasons.items() if any(found)}


def summarize(out: Path, index: dict[str, Any]) -> str:
    """Returns a summary of the cache in a few lines."""
    rounding, bad = index["rounding"], find_unusable(index)
    lines = [f"{len(index['clips'])} clips, {sum(index['shards'])} frames in {out}: train with data.latents={out}"]
    if rounding["largest"]:
        lines.append(
            f"{index['dtype']} costs at most {rounding['largest']:.2g} of a value, {rounding['relative_rms']:.2g} of "
            "their root mean square"
        )
    lines += [f"{len(bad)} clips have frames that cannot be used; training replaces them:"] if bad else []
    lines += [f"  {name}: {reason}" for name, reason in islice(bad.items(), 10)]
    return "\n".join(lines)
