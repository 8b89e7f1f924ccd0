"""Features of both sides -> values, with what tells whether to trust them: spread, floor, sensitivity, warnings."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import Any

import numpy as np
import torch

from datasets.readers import VIDEO_SUFFIXES
from engine.distributed import broadcast_object

from .cache import FeatureCache, cache_key
from .detectors import DETECTORS, Detector
from .distances import Moments, frechet_distance, frechet_from_moments, inception_score, kernel_distance
from .extract import PLAIN, Extractor, FeatureSet
from .protocols import Metric, Protocol, SideRules, protocol_for
from .sources import Source, Window, draw

log = logging.getLogger(__name__)

CHECKS = ("floor", "shuffle")
REPORTS = ("clip", "frame")
ENOUGH = 2048  # items below which the bias of a Frechet distance is no longer small
SHORTEST = 16  # frames of the shortest part of a clip that `frame` reports on
POSITIONS = 16  # frames of a clip at most that `frame` reports on
SPLITS, SUBSETS, SUBSET_SIZE = 10, 100, 1000
MOMENT_ROWS = 4096
MAX_ROWS = 50_000  # real features that are kept; of more, for a Frechet distance, only the moments
Score = tuple[float, float | None]  # value, and its deviation over subsets or splits

Taken = Callable[[str, SideRules], "Sequence[Window] | None"]  # (side, rules) -> windows of a manifest


@dataclass
class Evaluation:
    """One comparison of two sources.

    Args:
        real: None where only metrics that do not look at real data are asked for.
        detectors: by `Metric.family`.
        windows: what a manifest says to read, instead of what the rules choose; None: the rules choose.
        cache: of the real side; None: everything is computed.
        checks: some of CHECKS. reports: some of REPORTS.
    """

    real: Source | None
    fake: Source
    protocol: Protocol
    detectors: Mapping[str, Detector]
    extractor: Extractor
    cache: FeatureCache | None = None
    windows: Taken | None = None
    checks: Sequence[str] = CHECKS
    reports: Sequence[str] = ("clip",)
    known: dict[tuple[Any, ...], FeatureSet] = field(default_factory=dict)
    read: dict[tuple[str, SideRules], FeatureSet] = field(default_factory=dict)  # what went into the values

    def measure(self, metric: Metric, seeds: Sequence[int]) -> dict[str, Any]:
        """The whole entry of one metric in the result file; {} on ranks other than 0."""
        sides = [side for side in ("real", "fake") if getattr(metric, f"num_{side}") != 0]
        protocols = [protocol_for(metric, self.protocol, seed) for seed in seeds]
        if all(protocols[0].side(side).seed is None for side in sides):
            protocols = protocols[:1]  # nothing is drawn, so every seed would give the same
        runs = []
        for protocol in protocols:
            sets = {side: self.features(side, metric, protocol.side(side)) for side in sides}
            if self.extractor.world.is_main:
                _same_size(self, sets)
                runs.append((sets, self._scores(metric, protocol, sets)))
        if not runs:
            return {}
        entry = _summary([scores for _, scores in runs])
        entry["detector"] = self.detectors[metric.family].name
        entry["protocol"] = protocols[0].to_dict() | {"seed": None, "seeds": [each.seed for each in protocols]}
        entry["counts"] = {
            side: _counts(getattr(self, side), metric, [sets[side] for sets, _ in runs]) for side in sides
        }
        entry["dropped"] = {side: _dropped([sets[side] for sets, _ in runs]) for side in sides}
        entry["warnings"] = _warnings(self, metric, protocols[0], {side: runs[0][0][side] for side in sides})
        return entry

    # ---- features ----------------------------------------------------------------------------------

    def features(self, side: str, metric: Metric, rules: SideRules) -> FeatureSet:
        """The features of one side; the same ones are computed once."""
        detector, variants = self.detectors[metric.family], self._variants(side, metric)
        max_rows = MAX_ROWS if side == "real" and metric.kind == "frechet" else None
        asked = (side, rules, detector.name, variants, max_rows)
        if asked not in self.known:
            windows = self.windows(side, rules) if self.windows else None
            self.known[asked] = self._cached(side, rules, detector, variants, windows, max_rows)
        self.read[side, rules] = self.known[asked]
        return self.known[asked]

    def _variants(self, side: str, metric: Metric) -> tuple[str, ...]:
        """What else than the clips themselves the detector is shown."""
        if metric.unit == "frame":
            return (PLAIN,)
        lengths = tuple(f"first{length}" for length in self._lengths(metric))
        wanted = side == "real" and metric.kind != "inception_score" and "shuffle" in self.checks
        return (PLAIN, *lengths, *(("shuffled",) if wanted else ()))

    def _lengths(self, metric: Metric) -> list[int]:
        """16, 32, ... frames, below those of the metric."""
        if "frame" not in self.reports or metric.unit != "clip":
            return []
        return [SHORTEST << power for power in range(20) if SHORTEST << power < metric.frames]

    def _cached(
        self,
        side: str,
        rules: SideRules,
        detector: Detector,
        variants: tuple[str, ...],
        windows: Sequence[Window] | None,
        max_rows: int | None,
    ) -> FeatureSet:
        source, world = self.real if side == "real" else self.fake, self.extractor.world
        assert source is not None  # checked before anything is read
        cache = self.cache if side == "real" and world.is_main else None
        more = {"variants": variants, "windows": windows, "max_rows": max_rows, "device": world.device.type}
        key = cache_key(rules, source, f"{detector.name} {detector.sha256}", **more)
        found = cache.load(key, source) if cache else None
        if not broadcast_object(found is not None):
            found = self.extractor.extract(source, rules, detector, variants, windows, max_rows)
            if cache:
                _keep(cache, key, source, found, {"root": source.root, "detector": detector.name, "rules": vars(rules)})
        return found or FeatureSet()

    # ---- values ------------------------------------------------------------------------------------

    def _scores(self, metric: Metric, protocol: Protocol, sets: Mapping[str, FeatureSet]) -> dict[str, Any]:
        """The value of one seed, and the checks beside it."""
        real, fake = sets.get("real"), sets["fake"]
        value, spread = score(metric, protocol, real, fake)
        scores: dict[str, Any] = {"value": value, "spread": spread}
        if real is not None and "floor" in self.checks:
            halves = real_halves(real, protocol.seed)
            if min(half.count for half in halves) > 1:
                scores["floor"] = score(metric, protocol, *halves)[0]
                scores["floor_counts"] = [half.count for half in halves]
        if real is not None and "shuffled" in real.rows:
            scores["shuffled"] = score(metric, protocol, real, replace(real, rows={PLAIN: real.rows["shuffled"]}))[0]
        if "frame" in self.reports:
            scores |= self._along(metric, protocol, real, fake, value)
        return scores

    def _along(
        self, metric: Metric, protocol: Protocol, real: FeatureSet | None, fake: FeatureSet, value: float
    ) -> dict[str, Any]:
        """How the value goes along the clip: by its length; of frames, by their place in it."""

        def part(side: FeatureSet | None, name: str) -> FeatureSet | None:
            return side and replace(side, rows={PLAIN: side.rows[name]})

        if metric.unit == "clip":
            lengths = {n: score(metric, protocol, part(real, f"first{n}"), part(fake, f"first{n}"))[0]  # type: ignore[arg-type]
                       for n in self._lengths(metric)}  # fmt: skip
            return {"by_length": lengths | {metric.frames: value}}
        places = np.concatenate([np.asarray(window.indices) for window in fake.windows])
        shown = np.unique(np.linspace(0, places.max(), POSITIONS).round().astype(int))
        enough = [place for place in shown.tolist() if (places == place).sum() >= SPLITS]
        rows = fake.rows[PLAIN]
        at = {place: replace(fake, rows={PLAIN: rows[torch.from_numpy(places == place)]}) for place in enough}
        return {"by_frame": {place: score(metric, protocol, real, each)[0] for place, each in at.items()}}


def score(metric: Metric, protocol: Protocol, real: FeatureSet | None, fake: FeatureSet) -> Score:
    """The metric of two sets of features; its deviation where it is a mean over subsets or splits."""
    if metric.kind == "inception_score":
        return inception_score(fake.rows[PLAIN], splits=SPLITS, shuffle_seed=metric.shuffle_seed)
    assert real is not None  # a distance has two sides
    if metric.kind == "kernel":
        x, y = real.rows[PLAIN], fake.rows[PLAIN]
        return kernel_distance(x, y, subsets=SUBSETS, subset_size=SUBSET_SIZE, seed=protocol.seed)
    if protocol.divisor == "n" and real.rows and fake.rows:
        return frechet_distance(real.rows[PLAIN], fake.rows[PLAIN]), None
    return frechet_from_moments(moments_of(real), moments_of(fake), protocol.divisor), None


def moments_of(features: FeatureSet) -> Moments:
    """Of all items."""
    if features.moments:
        return sum(features.moments[1:], features.moments[0])
    rows = features.rows[PLAIN]
    moments = Moments(rows.shape[1])
    for part in rows.split(MOMENT_ROWS):
        moments.add(part)
    return moments


def real_halves(features: FeatureSet, seed: int) -> tuple[FeatureSet, FeatureSet]:
    """Two random halves of the clips, as many in one as in the other; no clip has frames in both."""
    if features.moments:
        first, second = (FeatureSet(moments=[half]) for half in features.moments)
        return first, second
    clips = np.repeat([window.clip for window in features.windows], features.items_per_window())
    order = draw(seed, "halves").permutation(np.unique(clips))
    half = len(order) // 2
    rows = features.rows[PLAIN]
    parts = [rows[torch.from_numpy(np.isin(clips, some))] for some in (order[:half], order[half : 2 * half])]
    return FeatureSet({PLAIN: parts[0]}), FeatureSet({PLAIN: parts[1]})


def _keep(cache: FeatureCache, *entry: Any) -> None:
    """Store an entry; a cache that cannot be written costs time, not the result."""
    try:
        cache.store(*entry)
    except OSError as error:
        log.warning("the cache %s cannot be written (%s): see --cache_dir", cache.folder, error.strerror or error)


# ------------------------------------------------------------------------------------------- summaries


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds; the deviation is that of a sample (divided by one less than the seeds)."""
    values = [run["value"] for run in runs]
    entry: dict[str, Any] = {
        "value": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "values": values,
    }
    if runs[0]["spread"] is not None:  # of a mean over subsets or splits
        entry["spread"] = statistics.fmean(run["spread"] for run in runs)
    for check in ("floor", "shuffled"):
        if check in runs[0]:
            entry[check] = statistics.fmean(run[check] for run in runs)
    entry |= {key: runs[0][key] for key in ("floor_counts",) if key in runs[0]}
    for key in ("by_length", "by_frame"):
        if key in runs[0]:
            entry[key] = {place: statistics.fmean(run[key][place] for run in runs) for place in runs[0][key]}
    return entry


def _same_size(evaluation: Evaluation, sets: Mapping[str, FeatureSet]) -> None:
    sizes = {side: features.size for side, features in sets.items()}
    if len(set(sizes.values())) > 1:
        said = " and ".join(f"the {side} ones {size[1]}x{size[0]}" for side, size in sizes.items() if size)
        raise ValueError(f"the frames differ in size, {said}: give --resolution, to which all are cropped and resized")


def _counts(source: Source, metric: Metric, sets: Sequence[FeatureSet]) -> dict[str, Any]:
    """What was asked for, found, used and left out on one side; of several seeds, the first."""
    features = sets[0]
    return {
        "used": features.count,
        "unit": metric.unit,
        "clips_used": len({window.clip for window in features.windows}),
        "clips_found": len(source.clips),
        "too_short": len(features.short),
        "unreadable": len(features.unreadable),
        "cut_off": len(features.cut_off),
        "height": features.size[0] if features.size else None,
        "width": features.size[1] if features.size else None,
    }


def _dropped(sets: Sequence[FeatureSet]) -> dict[str, dict[str, str]]:
    """Every clip that was left out in any seed, with the reason; and those used though their end is missing."""
    merged: dict[str, dict[str, str]] = {}
    for note in ("unreadable", "short", "cut_off"):
        merged["too_short" if note == "short" else note] = {
            name: reason for features in sets for name, reason in sorted(getattr(features, note).items())
        }
    return merged


def _warnings(evaluation: Evaluation, metric: Metric, protocol: Protocol, sets: Mapping[str, FeatureSet]) -> list[str]:
    """What makes this value less than it seems, a sentence each."""
    counts = {side: features.count for side, features in sets.items()}
    found = [*_count_warnings(metric, protocol, counts), *_data_warnings(evaluation, protocol, sets)]
    detector = evaluation.detectors[metric.family]
    if DETECTORS[detector.name].stand_in:
        found.append(f"{detector.name} is a stand-in: the value compares with no published one")
    if metric.kind == "frechet" and min(counts.values()) <= detector.dims:
        found.append(f"{min(counts.values())} items for {detector.dims} features: the covariance is not of full rank")
    if protocol.changed:
        found.append(f"not the protocol {protocol.name} as it is known: {', '.join(protocol.changed)}")
    return found


def _count_warnings(metric: Metric, protocol: Protocol, counts: Mapping[str, int]) -> list[str]:
    found = []
    for side, used in counts.items():
        asked = getattr(protocol, f"num_{side}")
        if asked is not None and used < asked and (side == "fake" or metric.unit == "clip"):
            found.append(f"{used} {side} {metric.unit}s were used, fewer than the {asked} that {metric.name} asks for")
    if metric.kind == "frechet" and min(counts.values()) < ENOUGH:
        found.append(
            f"fewer than {ENOUGH} {metric.unit}s: their number alone raises the value; compare at equal counts only"
        )
    if metric.unit == "clip" and len(set(counts.values())) > 1:
        found.append(f"{counts['real']} real against {counts['fake']} fake clips: give both sides as many")
    return found


def _data_warnings(evaluation: Evaluation, protocol: Protocol, sets: Mapping[str, FeatureSet]) -> list[str]:
    found = []
    for side, features in sets.items():
        dropped = [f"{len(features.unreadable)} unreadable", f"{len(features.short)} too short"]
        if features.unreadable or features.short:
            found.append(f"{side} clips were left out: {', '.join(dropped)}; the result file names them")
        if features.cut_off:
            found.append(f"{len(features.cut_off)} {side} files are cut off, and were used as far as they go")
    words = {word.lower() for word in PurePath(evaluation.real.root).parts} if evaluation.real else set()
    if "real" in sets and protocol.split == "train" and words & {"test", "val", "valid", "validation"}:
        found.append(f"'{evaluation.real.root}' does not look like the training split that is stated: see --split")  # type: ignore[union-attr]
    lossy = sum(PurePath(clip.name).suffix.lower() in VIDEO_SUFFIXES for clip in evaluation.fake.clips)
    if lossy and protocol.fake_storage == "as read":
        found.append("the fakes are video files, whose losses count against them: score the lossless arrays")
    return found
