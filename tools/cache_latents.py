"""Encodes a data set once: latent mean and deviation of every frame, also mirrored if the recipe flips clips.

    python -m tools.cache_latents --config configs/ffs/ffs_train.yaml data.path=/data/ffs --out /data/ffs_latents
    python -m engine.elastic --nproc_per_node=8 -m tools.cache_latents --config ... --out ...
    bash train_scripts/launch.sh train.py ... data.latents=/data/ffs_latents

Run the same command again after any interruption: finished shards are kept. docs/latents.md describes the format and
the settings that may change between caching and training.
"""

from __future__ import annotations

import argparse
import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from common.checks import require
from common.storage import free_bytes, write_json
from common.text import gigabytes
from datasets import Clip, VideoError, build_dataset
from datasets.catalog import compute_digest
from datasets.clips import ClipDataset, Pixels, describe_failure
from datasets.latents import FrameRun, LatentCache, StoredClip
from datasets.readers import Reader
from datasets.shards import NUMBER_FORMATS
from engine import cli
from engine.config import Config, load_config
from engine.distributed import World, close_world, gather_objects, init_world, on_main
from engine.errors import TrainingAborted
from engine.stream import Breadcrumbs, loaded_items, worker_loader
from models.autoencoder import LatentCodec
from models.identity import codec_identity
from tools.cache_writer import PATIENCE_S, PLAN, CacheWriter, build_parser

SHARD_MB = 64
PIECE_BYTES = 2**26  # decoded frames that a loader worker returns at a time
LEAST_SHARDS = 64  # even for a small set, so that a kill loses little and all ranks get work


class Piece(NamedTuple):
    """Consecutive frames of one clip; `length` is the clip's number of frames when it was measured."""

    clip: int
    frames: range
    length: int


LoadedPiece = tuple[int, Tensor, list[FrameRun]]  # clip number; frames (T, V, 3, H, W) in [-1, 1]; their runs


@dataclass(frozen=True)
class Loader:
    """Measures clips and decodes pieces in loader workers; the last `listed` clips are images of data.frame_list.

    `views` is 2 if frames are also mirrored, else 1.
    """

    clips: list[Clip]
    listed: int
    source: Pixels
    views: int
    workers: int
    crumbs: Breadcrumbs

    def load(self, items: Sequence[Any], function: Callable[[Any], Any]) -> Iterator[Any]:
        """Yields `function(item)`, computed by the workers, in order. Raises: TrainingAborted."""
        self.crumbs.clear()
        loader = worker_loader(cast(Any, items), self.workers, 2, batch_size=None, collate_fn=function)
        try:
            yield from loaded_items(loader, timeout_s=math.inf)
        except RuntimeError as error:
            explained = self.crumbs.explain(error)
            if explained is None:
                raise
            raise TrainingAborted(explained) from error
        finally:
            self.crumbs.clear()

    def measure(self, number: int) -> StoredClip:
        """Opens a clip for its length, without decoding; returns it with no place in a shard yet."""
        clip = self.clips[number]
        listed = number >= len(self.clips) - self.listed
        stored = StoredClip(clip.name, clip.size, clip.num_frames, listed=listed)
        try:
            reader = self._open(clip)
        except VideoError as error:
            return replace(stored, reason=describe_failure(error, clip))
        return replace(stored, frames=len(reader), cut_off=reader.cut_off)

    def decode(self, piece: Piece) -> LoadedPiece:
        """Decodes a piece; unusable frames become zeros, and their runs state the reason."""
        clip, side = self.clips[piece.clip], self.source.config.image_size
        frames: dict[int, Any]
        try:
            frames = self._read(piece)
        except VideoError as error:  # the clip as a whole
            frames = dict.fromkeys(piece.frames, error)
        parts, runs = list[Tensor](), list[FrameRun]()
        for _, group in groupby(frames.values(), lambda frame: getattr(frame, "shape", None) or str(frame)):
            like = list(group)
            if isinstance(like[0], VideoError):
                parts.append(torch.zeros(len(like), self.views, 3, side, side))
                runs.append(FrameRun(len(like), 0, 0, describe_failure(like[0], clip)))
                continue
            images = torch.from_numpy(np.stack(like)).permute(0, 3, 1, 2).contiguous()  # (T, C, H, W)
            parts.append(torch.stack([self.source.finish(images, bool(view)) for view in range(self.views)], dim=1))
            runs.append(FrameRun(len(like), *images.shape[-2:]))
        return piece.clip, torch.cat(parts), runs

    def _read(self, piece: Piece) -> dict[int, np.ndarray | VideoError]:
        """Returns each frame (H, W, C) of a piece, or why it cannot be used. Raises: VideoError if none can."""
        clip = self.clips[piece.clip]
        reader = self._open(clip)
        if len(reader) != piece.length:
            raise VideoError(clip.path, f"has changed: {piece.length} frames when measured, {len(reader)} now")
        if reader.damage:
            raise VideoError(clip.path, reader.damage)
        return reader.read_each(list(piece.frames))

    def _open(self, clip: Clip) -> Reader:
        """Returns the reader of a clip; records the path first, in case the file crashes the worker."""
        if self.workers:
            self.crumbs(clip.path)
        return self.source.open(clip)


def merge_runs(runs: Iterable[FrameRun]) -> list[FrameRun]:
    """Returns the runs, with adjacent ones joined if they differ only in length."""
    groups = groupby(runs, key=lambda run: run[1:])
    return [FrameRun(sum(run.frames for run in group), *like) for like, group in groups]


def list_clips(config: Config) -> ClipDataset:
    """Returns the data set of all clips usable with any window length, held-out ones included."""
    require(config.data.latents is None, "data.latents must not be set: this command encodes the videos")
    if config.data.max_clips is not None and not config.data.val_share:  # only the clips that the run uses
        return build_dataset(config.data, seed=0)
    every = replace(config.data, num_frames=1, frame_interval=1, val_path=None, val_share=0.0, max_clips=None)
    return build_dataset(every, seed=0)


def place_clips(clips: Iterable[StoredClip], shard_frames: int) -> Iterator[StoredClip]:
    """Yields the clips in order, each with its place; a shard has at most `shard_frames` frames, or one clip."""
    shard = filled = 0
    for clip in clips:
        if clip.frames and filled and filled + clip.frames > shard_frames:
            shard, filled = shard + 1, 0
        yield replace(clip, shard=shard, first=filled)
        filled += clip.frames


def count_frames(plan: Iterable[StoredClip]) -> list[int]:
    """Returns the number of frames of each shard."""
    return [sum(clip.frames for clip in shard) for _, shard in groupby(plan, key=lambda clip: clip.shard)]


class FrameWriter(CacheWriter):
    """Encodes all clips of `config.data` into `out`, with the encoder `made_by`, to frames of `shape`."""

    cache: ClassVar[type[LatentCache]]  # reads the result

    def __init__(
        self, made_by: Any, shape: Any, config: Config, out: Path, dtype: str, shard_bytes: int, world: World
    ) -> None:
        dataset = list_clips(config)
        images = list({clip.name: clip for clip in dataset.images or []}.values())
        clips = [*{clip.name: clip for clip in dataset.catalog.clips}.values(), *images]  # captions may repeat a clip
        self.shape = (1 + dataset.flips, *shape)
        identity = {
            "format": self.cache.format,
            self.cache.maker: made_by,
            "settings": dataset.latent_settings,
            "data": compute_digest(clips, []),
            "dtype": dtype,
            "shape": list(self.shape),  # of one frame, with its views
        }
        super().__init__(out, identity, world)
        self.row_bytes = math.prod(self.shape) * NUMBER_FORMATS[dtype].torch.itemsize
        source, crumbs = cast(Pixels, dataset.source), Breadcrumbs(out, world.rank)
        self.loader = Loader(clips, len(images), source, self.shape[0], config.data.num_workers, crumbs)
        self.data, self.dtype, self.shard_bytes = config.data, dtype, shard_bytes
        frame_bytes = self.shape[0] * 12 * config.data.image_size**2
        self.piece_frames = max(16, PIECE_BYTES // frame_bytes // 16 * 16)  # 16: the usual chunk size
        self.plan: list[StoredClip] = []
        self.frames: list[int] = []  # per shard

    @abstractmethod
    def encode_frames(self, frames: Tensor) -> Tensor:
        """Encodes (T, V, 3, H, W) in [-1, 1] to (T, V, ...) in fp32."""

    def read_finished(self) -> dict[str, Any]:
        index = self.cache.read_index(self.out)
        self.cache(self.out)  # checks the shards
        return index

    def encode(self) -> int:
        self.plan = self.make_plan()
        self.frames = count_frames(self.plan)
        on_main(self.check_room)
        share = self.assign_shards(len(self.frames))
        pieces = {number: list(self.cut_pieces(number)) for number in share}
        loaded = self.loader.load([piece for number in share for piece in pieces[number]], self.loader.decode)
        with self.progress("encoding", "frame", sum(self.frames[number] for number in share)) as bar:
            for number in share:
                record: dict[str, Any] = {"runs": {}, "errors": [0.0, 0.0, 0.0]}
                rows = self.encode_pieces(islice(loaded, len(pieces[number])), record, bar)
                self.write_shard(number, self.dtype, (self.frames[number], *self.shape), rows, record)
        return len(self.frames)

    def make_plan(self) -> list[StoredClip]:
        """Returns every clip with its length and place, from plan.json or newly measured; the same on every rank."""

        def parse(plan: Any) -> tuple[dict[str, Any], list[StoredClip]]:
            return dict(plan["identity"]), [StoredClip.from_json(facts) for facts in plan["clips"]]

        known = on_main(lambda: self.read_plan(parse))
        if known is not None:
            self.check_identity(known[0])
            return known[1]
        measured = self.measure_clips()
        most = min(self.shard_bytes // self.row_bytes, sum(clip.frames for clip in measured) // LEAST_SHARDS)
        plan = list(place_clips(measured, most))
        content = {"identity": self.identity, "clips": [clip.to_json() for clip in plan]}
        on_main(lambda: write_json(self.out / PLAN, content))
        return plan

    def measure_clips(self) -> list[StoredClip]:
        """Returns every clip with its length; ranks share the work. Raises VideoError if no clip is usable."""
        clips, rank, size = self.loader.clips, self.world.rank, self.world.size
        share, found = range(rank, len(clips), size), []
        with self.progress("measuring", "clip", len(share)) as bar:
            for stored in self.loader.load(share, self.loader.measure):
                found.append(stored)
                bar.update()
        shares = gather_objects(found)
        measured = [shares[number % size][number // size] for number in range(len(clips))]
        for clip, stored in zip(clips, measured, strict=True):
            reason = stored.reason or stored.cut_off
            if reason and self.data.strict:
                raise VideoError(clip.path, reason)
        if not any(stored.frames for stored in measured):
            raise VideoError(clips[0].path, f"{measured[0].reason}; no other clip can be used either")
        return measured

    def check_room(self) -> None:
        """Prints the size of the cache. Raises OSError if the disk is too small for the missing shards."""
        missing = self.find_missing(len(self.frames))
        needed, free = self.row_bytes * sum(self.frames[number] for number in missing), free_bytes(self.out)
        each = f"{self.cache.key} of {'x'.join(map(str, self.shape[1:]))}" + ", also mirrored," * (self.shape[0] == 2)
        print(
            f"{len(self.plan)} clips, {sum(self.frames)} frames: {each} in {self.dtype}, "
            f"{gigabytes(self.row_bytes * sum(self.frames))} in {len(self.frames)} shards\n"
            f"{len(self.frames) - len(missing)} shards are done; {gigabytes(needed)} to write into {self.out}, "
            f"{gigabytes(free)} free",
            flush=True,
        )
        if needed > free:
            raise OSError(
                f"--out {self.out} has {gigabytes(free)} free, but the cache needs {gigabytes(needed)}: make room, or "
                "halve it with --dtype fp16"
            )

    def cut_pieces(self, shard: int) -> Iterator[Piece]:
        """Yields the clips of a shard, cut into pieces of at most `piece_frames`."""
        size = self.piece_frames
        for number, clip in enumerate(self.plan):
            for first in range(0, clip.frames if clip.shard == shard else 0, size):
                yield Piece(number, range(first, min(first + size, clip.frames)), clip.frames)

    def encode_pieces(self, pieces: Iterable[LoadedPiece], record: dict[str, Any], bar: Any) -> Iterator[Tensor]:
        """Yields the encoded frames (T, V, ...) of each piece, in the cache's number format.

        Adds to `record` each clip's runs, the largest rounding error, and the sums of squares of the exact values
        and of the errors. Raises ValueError for non-finite values; VideoError, with data.strict, for a bad frame.
        """
        for batch in self.batch_pieces(pieces):
            for clip, _, runs in batch:
                reason = next((run.reason for run in runs if run.reason), None)
                if reason and self.data.strict:
                    raise VideoError(self.loader.clips[clip].path, reason)
            encoded = self.encode_frames(torch.cat([frames for _, frames, _ in batch]))
            for (clip, frames, runs), exact in zip(batch, encoded.split([len(piece[1]) for piece in batch])):
                yield self.store(clip, exact, record["errors"])
                record["runs"][clip] = merge_runs([*record["runs"].get(clip, []), *runs])
                bar.update(len(frames))

    def batch_pieces(self, pieces: Iterable[LoadedPiece]) -> Iterator[list[LoadedPiece]]:
        """Yields pieces in order, in lists of at most a full piece's frames: short clips share the encoder's chunks."""
        batch: list[LoadedPiece] = []
        filled = 0
        for piece in pieces:
            if batch and filled + len(piece[1]) > self.piece_frames:
                yield batch
                batch, filled = [], 0
            batch.append(piece)
            filled += len(piece[1])
        if batch:
            yield batch

    def store(self, clip: int, exact: Tensor, errors: list[float]) -> Tensor:
        """Returns frames in the cache's number format; updates `errors`. Raises ValueError if they are not finite."""
        stored = exact.to(NUMBER_FORMATS[self.dtype].torch)
        if not stored.isfinite().all():
            raise ValueError(
                f"{self.cache.key} of {self.plan[clip].name!r} are not finite in {self.dtype}: choose another "
                "--dtype, or an encoder in fp32"
            )
        error = stored.float() - exact
        errors[0] = max(errors[0], float(error.abs().max()))
        errors[1] += float(exact.double().square().sum())
        errors[2] += float(error.double().square().sum())
        return stored

    def finish(self, records: list[Any]) -> str:
        runs = {int(number): found for record in records for number, found in record["runs"].items()}
        clips = [{**clip.to_json(), "runs": runs.get(number, [])} for number, clip in enumerate(self.plan)]
        largest, squares, lost = zip(*(record["errors"] for record in records), strict=True)
        rounding = {"largest": max(largest), "relative_rms": math.sqrt(sum(lost) / max(sum(squares), 1e-300))}
        self.write_index({**self.identity, "rounding": rounding, "shards": self.frames, "clips": clips})
        out, bad = self.out, find_unusable(clips)
        lines = [f"{len(clips)} clips, {sum(self.frames)} frames in {out}: train with {self.cache.setting}={out}"]
        if rounding["largest"]:
            lines.append(
                f"rounding to {self.dtype}: largest error {rounding['largest']:.2g}, relative RMS error "
                f"{rounding['relative_rms']:.2g}"
            )
        lines += [f"{len(bad)} clips have unusable frames; training replaces them:"] if bad else []
        return "\n".join([*lines, *(f"  {name}: {reason}" for name, reason in islice(bad.items(), 10))])


class LatentWriter(FrameWriter):
    """Encodes frames with `config.codec`."""

    cache = LatentCache
    layout = cache.key, cache.format

    def __init__(self, config: Config, out: Path, dtype: str, shard_bytes: int, world: World) -> None:
        self.codec = LatentCodec.from_config(config.codec, world.device)
        shape = (1 + self.codec.stochastic, config.codec.latent_channels, config.latent_size, config.latent_size)
        super().__init__(codec_identity(config.codec), shape, config, out, dtype, shard_bytes, world)

    def encode_frames(self, frames: Tensor) -> Tensor:
        """Encodes (T, V, 3, H, W) to (T, V, P, C, h, w) in fp32, each view as a separate clip.

        Chunks are padded to full size, as in training: kernels may sum in another order at another batch size.
        """
        padding = -len(frames) % self.codec.config.chunk_size
        whole = torch.cat([frames, frames[-1:].expand(padding, *frames.shape[1:])])
        views = [self.codec.posterior(view[None].to(self.world.device)) for view in whole.unbind(1)]
        parts = [torch.stack([part for part in view if part is not None], dim=2)[0] for view in views]
        return torch.stack(parts, dim=1)[: len(frames)]


def find_unusable(clips: Iterable[dict[str, Any]]) -> dict[str, str]:
    """Returns clip name -> reason for the clips of an index that have unusable frames."""
    reasons = {clip["name"]: [clip.get("reason"), *(run[3] for run in clip["runs"])] for clip in clips}
    return {name: next(filter(None, found)) for name, found in reasons.items() if any(found)}


def run(argv: list[str], parser: argparse.ArgumentParser, build: Callable[..., FrameWriter]) -> int:
    """Writes the cache of `build(arguments, config, out, dtype, shard_bytes, world)`; returns the exit code."""
    number = "number format; fp16 and bf16 halve the size, and their rounding error is printed (%(default)s)"
    size = "size of a shard; after a kill, an unfinished shard is encoded again (%(default)s)"
    parser.add_argument("--dtype", choices=NUMBER_FORMATS, default="fp32", help=number)
    parser.add_argument("--shard_mb", type=int, default=SHARD_MB, metavar="N", help=size)
    arguments = parser.parse_intermixed_args(argv)
    require(arguments.shard_mb >= 1, f"--shard_mb {arguments.shard_mb} must be at least 1.")
    config = load_config(arguments.config, arguments.overrides)
    world = init_world(arguments.device, timeout_s=PATIENCE_S)
    build(arguments, config, arguments.out, arguments.dtype, arguments.shard_mb * 10**6, world).write()
    close_world()
    return 0


def main(argv: list[str]) -> int:
    """Runs the command; returns the exit code."""
    return run(argv, build_parser(__doc__ or ""), lambda _, *settings: LatentWriter(*settings))


if __name__ == "__main__":
    cli.run(main)
