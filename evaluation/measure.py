"""Features of both sides -> values, with what tells whether to trust them: spread, floor, sensitivity, warnings."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch

from datasets.readers import VIDEO_SUFFIXES
from engine.distributed import broadcast_object, on_main

from .cache import FeatureCache, cache_key
from .detectors import DETECTORS, Detector
from .distances import Moments, frechet_distance, frechet_from_moments, inception_score, kernel_distance
from .extract import PLAIN, Extractor, FeatureSet, halves
from .protocols import Metric, Protocol, SideRules, protocol_for
from .report import library_versions
from .sources import Source, Window, first_size

log = logging.getLogger(__name__)

CHECKS = ("floor", "shuffle")
REPORTS = ("clip", "frame")
ENOUGH = 2048  # items below which the bias of a Frechet distance is no longer small
SHORTEST = 16  # frames of the shortest part of a clip that `frame` reports on
POSITIONS = 16  # frames of a clip at most that `frame` reports on
SPLITS, SUBSETS, SUBSET_SIZE = 10, 100, 1000
MOMENT_ROWS = 4096
MAX_ROWS = 50_000  # features of real frames that are kept; of more, their moments and a sample of so many
Score = tuple[float, float | None]  # value, and its deviation over subsets or splits

Listed = Callable[[str, SideRules], tuple[SideRules, "Sequence[Window]"]]  # `Manifest`


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
    windows: Listed | None = None
    checks: Sequence[str] = CHECKS
    reports: Sequence[str] = ("clip",)
    known: dict[tuple[Any, ...], FeatureSet] = field(default_factory=dict)
    read: dict[tuple[str, SideRules], FeatureSet] = field(default_factory=dict)  # what went into the values

    def measure(self, metric: Metric, seeds: Sequence[int]) -> dict[str, Any]:
        """The whole entry of one metric in the result file; {} on ranks other than 0."""
        sides = _sides(metric)
        protocols = [protocol_for(metric, self.protocol, seed) for seed in seeds]
        runs = []
        for protocol in protocols:
            sets = {side: self.features(side, metric, protocol.side(side)) for side in sides}
            if self.extractor.world.is_main:
                _usable(self, metric, sets)
                runs.append((sets, self._scores(metric, protocol, sets)))
            if all(protocol.side(side).seed is None or sets[side].whole for side in sides):
                break  # nothing was drawn, so every seed would give the same
        if not runs:
            return {}
        entry = _summary([scores for _, scores in runs])
        counts = {side: _counts(self.source(side), metric, [sets[side] for sets, _ in runs]) for side in sides}
        entry["detector"] = self.detectors[metric.family].name
        used = {f"num_{side}": each["used"] for side, each in counts.items()}  # at most what the metric's name says
        entry["protocol"] = protocols[0].to_dict() | {"seed": None, "seeds": list(seeds[: len(runs)])} | used
        entry["counts"] = counts
        entry["dropped"] = {side: _dropped([sets[side] for sets, _ in runs]) for side in sides}
        entry["warnings"] = _warnings(self, metric, protocols[0], counts)
        return entry

    def look(self, metrics: Sequence[Metric]) -> None:
        """Find what a clip of each side can tell of all metrics, before anything is computed; on every rank.

        Raises: ValueError for too few clips, none that is long enough or readable, or another size on either side.
        """
        on_main(lambda: self._look(metrics))

    def _look(self, metrics: Sequence[Metric]) -> None:
        for metric in metrics:
            protocol, sizes = protocol_for(metric, self.protocol, seed=0), {}
            for side in _sides(metric):
                source = self.source(side)
                if metric.unit == "clip":
                    _enough(metric, source, len(source.clips))
                if self.windows is None:  # whose clips are known, and were read before
                    sizes[side] = first_size(source, protocol.side(side))
            _same_size(sizes)

    # ---- features ----------------------------------------------------------------------------------

    def features(self, side: str, metric: Metric, rules: SideRules) -> FeatureSet:
        """The features of one side; the same ones are computed once."""
        detector, variants = self.detectors[metric.family], self._variants(side, metric)
        max_rows = MAX_ROWS if side == "real" and metric.unit == "frame" else None
        what = (side, detector.name, variants, max_rows)
        for each in (rules.whole, rules):
            found = self.known.get((*what, each))
            if found and rules.allows(found.windows):
                break
        else:
            found = self._cached(side, rules, detector, variants, max_rows)
            each = rules.whole if found.whole else rules
            self.known[(*what, each)] = found
        self.read[side, each] = found
        return found

    def source(self, side: str) -> Source:
        """The real or the fake clips."""
        source = self.real if side == "real" else self.fake
        assert source is not None  # checked before anything is read
        return source

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
        max_rows: int | None,
    ) -> FeatureSet:
        """From the cache, or else computed; on ranks other than 0 without features."""
        source, world = self.source(side), self.extractor.world
        cache = self.cache if side == "real" and world.is_main else None
        given, windows = self.windows(side, rules) if self.windows else (rules, None)
        bits = {"device": world.device.type, "threads": torch.get_num_threads(), "versions": library_versions()}
        more = bits | {"variants": variants, "windows": windows, "max_rows": max_rows}

        def key(rules: SideRules) -> str:
            return cache_key(rules, source, f"{detector.name} {detector.sha256}", **more)

        entries = (cache.load(key(each), source, rules) for each in (given.whole, given)) if cache else ()
        found = next(filter(None, entries), None)
        known = broadcast_object(found and replace(found, rows={}, moments=[], kept=None))
        if known:
            return found or known
        found = self.extractor.extract(source, given, detector, variants, windows, max_rows)
        if windows is not None:
            found.whole = given == rules.whole
        if cache:
            under = given.whole if found.whole else given
            about = {"root": source.root, "detector": detector.name, "rules": vars(under)}
            _keep(cache, key(under), source, found, about)
        return found

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


def _sides(metric: Metric) -> list[str]:
    return [side for side in ("real", "fake") if getattr(metric, f"num_{side}") != 0]


def score(metric: Metric, protocol: Protocol, real: FeatureSet | None, fake: FeatureSet) -> Score:
    """The metric of two sets of features; its deviation where it is a mean over subsets or splits."""
    if metric.kind == "inception_score":
        return inception_score(fake.rows[PLAIN], splits=SPLITS, shuffle_seed=metric.shuffle_seed)
    assert real is not None  # a distance has two sides
    if metric.kind == "kernel":
        x, y = real.rows[PLAIN], fake.rows[PLAIN]
        value, spread = kernel_distance(x, y, subsets=SUBSETS, subset_size=SUBSET_SIZE, seed=protocol.seed)
        return value, None if len(x) == len(y) <= SUBSET_SIZE else spread  # each subset is all there is
    if protocol.divisor == "n" and not (real.moments or fake.moments):
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
    clips, rows = features.clips(), features.rows[PLAIN]
    if features.moments:  # whose halves are always the same
        parts = halves([window.clip for window in features.windows], seed=0)
    else:
        parts = halves(clips, seed)
        parts = (parts[0], parts[1][: len(parts[0])])
    first, second = (FeatureSet({PLAIN: rows[torch.from_numpy(np.isin(clips, some))]}) for some in parts)
    for half, moments in zip((first, second), features.moments):
        half.moments = [moments]
    return first, second


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


def _usable(evaluation: Evaluation, metric: Metric, sets: Mapping[str, FeatureSet]) -> None:
    """ValueError where the sides differ in size, or one has too few items for the metric."""
    _same_size({side: features.size for side, features in sets.items()})
    for side, features in sets.items():
        _enough(metric, evaluation.source(side), features.count)


def _same_size(sizes: Mapping[str, tuple[int, int] | None]) -> None:
    known = {side: size for side, size in sizes.items() if size}
    if len(set(known.values())) > 1:
        said = " and ".join(f"the {side} ones {width}x{height}" for side, (height, width) in known.items())
        raise ValueError(f"the frames differ in size, {said}: give --resolution, to which all are cropped and resized")


def _enough(metric: Metric, source: Source, count: int) -> None:
    fewest = SPLITS if metric.kind == "inception_score" else 2
    if count < fewest:
        raise ValueError(
            f"'{source.root}' has {count} {metric.unit}{'s' * (count != 1)} that can be used, but {metric.name} needs "
            f"{fewest} or more"
        )


def _counts(source: Source, metric: Metric, sets: Sequence[FeatureSet]) -> dict[str, Any]:
    """What was found, used and left out on one side. Of several seeds the fewest that one used, and all left out."""
    dropped, size = _dropped(sets), sets[0].size
    return {
        "used": min(features.count for features in sets),
        "unit": metric.unit,
        "clips_used": min(len({window.clip for window in features.windows}) for features in sets),
        "clips_found": len(source.clips),
        **{reason: len(names) for reason, names in dropped.items()},
        "height": size[0] if size else None,
        "width": size[1] if size else None,
    }


def _dropped(sets: Sequence[FeatureSet]) -> dict[str, dict[str, str]]:
    """Every clip that was left out in any seed, with the reason; and those used though their end is missing."""
    merged: dict[str, dict[str, str]] = {}
    for note in ("unreadable", "short", "cut_off"):
        merged["too_short" if note == "short" else note] = {
            name: reason for features in sets for name, reason in sorted(getattr(features, note).items())
        }
    return merged


def _warnings(
    evaluation: Evaluation, metric: Metric, protocol: Protocol, counts: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """What makes this value less than it seems, a sentence each. `counts`: of `_counts`, by side."""
    used = {side: each["used"] for side, each in counts.items()}
    found = [*_count_warnings(metric, protocol, used), *_data_warnings(evaluation, protocol, counts)]
    detector = evaluation.detectors[metric.family]
    spec = DETECTORS[detector.name]
    if spec.stand_in:
        found.append(f"{detector.name} is a stand-in: the value compares with no published one")
    elif spec.sha256 and detector.sha256 != spec.sha256:
        found.append(f"the detector is not the known {spec.file}: its SHA-256 is another one")
    if metric.kind == "frechet" and min(used.values()) <= detector.dims:
        found.append(f"{min(used.values())} items for {detector.dims} features: the covariance is not of full rank")
    if protocol.changed:
        found.append(f"not the protocol {protocol.name} as it is known: {', '.join(protocol.changed)}")
    return found


def _count_warnings(metric: Metric, protocol: Protocol, counts: Mapping[str, int]) -> list[str]:
    found = []
    asked = {side: getattr(protocol, f"num_{side}") for side in counts if side == "fake" or metric.unit == "clip"}
    few = [f"{counts[side]} {side}" for side, most in asked.items() if most is not None and counts[side] < most]
    if few:
        found.append(f"{' and '.join(few)} {metric.unit}s were used; {asked['fake']} are asked for")
    if metric.kind == "frechet" and min(counts.values()) < ENOUGH:
        found.append(
            f"fewer than {ENOUGH} {metric.unit}s: their number alone raises the value; compare at equal counts only"
        )
    if metric.unit == "clip" and len(set(counts.values())) > 1:
        found.append(f"{counts['real']} real against {counts['fake']} fake clips: give both sides as many")
    return found


def _same_place(*sources: Source) -> bool:
    return len({Path(source.root).resolve() for source in sources}) == 1


def _data_warnings(
    evaluation: Evaluation, protocol: Protocol, counts: Mapping[str, Mapping[str, Any]]
) -> list[str]:  # fmt: skip
    found = []
    for side, each in counts.items():
        dropped = [f"{each['unreadable']} unreadable", f"{each['too_short']} too short"]
        if each["unreadable"] or each["too_short"]:
            found.append(f"{side} clips were left out: {', '.join(dropped)}; the result file names them")
        if each["cut_off"]:
            found.append(f"{each['cut_off']} {side} files are cut off or damaged, and were used as far as they go")
    if "real" in counts and evaluation.real and _same_place(evaluation.real, evaluation.fake):
        found.append(f"real and fake clips are the same, '{evaluation.fake.root}': the value judges no sample")
    words = {word.lower() for word in PurePath(evaluation.real.root).parts} if evaluation.real else set()
    if "real" in counts and protocol.split == "train" and words & {"test", "val", "valid", "validation"}:
        found.append(f"'{evaluation.real.root}' does not look like the training split that is stated: see --split")  # type: ignore[union-attr]
    lossy = sum(PurePath(clip.name).suffix.lower() in VIDEO_SUFFIXES for clip in evaluation.fake.clips)
    if lossy and protocol.fake_storage == "as read":
        found.append("the fakes are video files, whose losses count against them: score the lossless arrays")
    return found
