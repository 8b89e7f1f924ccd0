"""Computes metrics from the features of both sides, with their spread, floor, sensitivity and warnings."""

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

from .cache import FeatureCache, build_cache_key
from .detectors import DETECTORS, Detector
from .distances import Moments, frechet_distance, frechet_from_moments, inception_score, kernel_distance
from .extract import PLAIN, Extractor, FeatureSet, split_halves
from .protocols import Metric, Protocol, SideRules, fill_protocol
from .report import list_library_versions
from .sources import Source, Window, find_first_size

log = logging.getLogger(__name__)

CHECKS = ("floor", "shuffle")
REPORTS = ("clip", "frame")
ENOUGH = 2048  # items below which a Frechet distance has a large bias
SHORTEST = 16  # frames of the shortest part of a clip that `frame` reports on
POSITIONS = 16  # frames of a clip at most that `frame` reports on
SPLITS, SUBSETS, SUBSET_SIZE = 10, 100, 1000
MOMENT_ROWS = 4096
MAX_ROWS = 50_000  # features of real frames to keep; above, moments and a sample of this size
Score = tuple[float, float | None]  # value, deviation over subsets or splits

Listed = Callable[[str, SideRules], tuple[SideRules, "Sequence[Window]"]]  # `Manifest`


@dataclass
class Evaluation:
    """Comparison of two sources.

    Args:
        real: None if no metric needs real data.
        detectors: by `Metric.family`.
        windows: windows of a manifest, instead of those of the rules.
        cache: of the real side; None computes everything.
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
    read: dict[tuple[str, SideRules], FeatureSet] = field(default_factory=dict)  # behind the values

    def measure(self, metric: Metric, seeds: Sequence[int]) -> dict[str, Any]:
        """Returns the entry of one metric in the result file; {} on ranks other than 0."""
        sides = _list_sides(metric)
        protocols = [fill_protocol(metric, self.protocol, seed) for seed in seeds]
        runs = []
        for protocol in protocols:
            sets = {side: self.features(side, metric, protocol.side(side)) for side in sides}
            if self.extractor.world.is_main:
                _require_usable(self, metric, sets)
                runs.append((sets, self._score_seed(metric, protocol, sets)))
            if all(protocol.side(side).seed is None or sets[side].whole for side in sides):
                break  # nothing was drawn: every seed gives the same
        if not runs:
            return {}
        entry = _summarise([scores for _, scores in runs])
        counts = {side: _count_clips(self.source(side), metric, [sets[side] for sets, _ in runs]) for side in sides}
        entry["detector"] = self.detectors[metric.family].name
        used = {f"num_{side}": each["used"] for side, each in counts.items()}  # at most the number in the metric's name
        entry["protocol"] = protocols[0].to_dict() | {"seed": None, "seeds": list(seeds[: len(runs)])} | used
        entry["counts"] = counts
        entry["dropped"] = {side: _list_dropped([sets[side] for sets, _ in runs]) for side in sides}
        entry["warnings"] = _list_warnings(self, metric, protocols[0], counts)
        return entry

    def check_inputs(self, metrics: Sequence[Metric]) -> None:
        """Checks the first usable clip of each side for all metrics before anything is computed; on every rank.

        Raises: ValueError for too few clips, none long enough or readable, or different sizes of the sides.
        """
        on_main(lambda: self._check_inputs(metrics))

    def _check_inputs(self, metrics: Sequence[Metric]) -> None:
        for metric in metrics:
            protocol, sizes = fill_protocol(metric, self.protocol, seed=0), {}
            for side in _list_sides(metric):
                source = self.source(side)
                if metric.unit == "clip":
                    _require_enough(metric, source, len(source.clips))
                if self.windows is None:  # the clips of a manifest were usable before
                    sizes[side] = find_first_size(source, protocol.side(side))
            _require_same_size(sizes)

    # ---- features ----------------------------------------------------------------------------------

    def features(self, side: str, metric: Metric, rules: SideRules) -> FeatureSet:
        """Returns the features of one side; equal requests are computed once."""
        detector, variants = self.detectors[metric.family], self._list_variants(side, metric)
        max_rows = MAX_ROWS if side == "real" and metric.unit == "frame" else None
        what = (side, detector.name, variants, max_rows)
        for each in (rules.whole, rules):
            found = self.known.get((*what, each))
            if found and rules.allows(found.windows):
                break
        else:
            found = self._load_or_extract(side, rules, detector, variants, max_rows)
            each = rules.whole if found.whole else rules
            self.known[(*what, each)] = found
        self.read[side, each] = found
        return found

    def source(self, side: str) -> Source:
        """Returns the real or the fake clips."""
        source = self.real if side == "real" else self.fake
        assert source is not None  # checked before anything is read
        return source

    def _list_variants(self, side: str, metric: Metric) -> tuple[str, ...]:
        """Lists the variants of the clips that the detector runs on."""
        if metric.unit == "frame":
            return (PLAIN,)
        lengths = tuple(f"first{length}" for length in self._list_lengths(metric))
        wanted = side == "real" and metric.kind != "inception_score" and "shuffle" in self.checks
        return (PLAIN, *lengths, *(("shuffled",) if wanted else ()))

    def _list_lengths(self, metric: Metric) -> list[int]:
        """Lists 16, 32, ... frames, below those of the metric."""
        if "frame" not in self.reports or metric.unit != "clip":
            return []
        return [SHORTEST << power for power in range(20) if SHORTEST << power < metric.frames]

    def _load_or_extract(
        self,
        side: str,
        rules: SideRules,
        detector: Detector,
        variants: tuple[str, ...],
        max_rows: int | None,
    ) -> FeatureSet:
        """Loads features from the cache, or extracts them; on ranks other than 0 without features."""
        source, world = self.source(side), self.extractor.world
        cache = self.cache if side == "real" and world.is_main else None
        given, windows = self.windows(side, rules) if self.windows else (rules, None)
        bits = {"device": world.device.type, "threads": torch.get_num_threads(), "versions": list_library_versions()}
        more = bits | {"variants": variants, "windows": windows, "max_rows": max_rows}

        def key(rules: SideRules) -> str:
            return build_cache_key(rules, source, f"{detector.name} {detector.sha256}", **more)

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
            _store(cache, key(under), source, found, about)
        return found

    # ---- values ------------------------------------------------------------------------------------

    def _score_seed(self, metric: Metric, protocol: Protocol, sets: Mapping[str, FeatureSet]) -> dict[str, Any]:
        """Returns the value of one seed, and its checks."""
        real, fake = sets.get("real"), sets["fake"]
        value, spread = score(metric, protocol, real, fake)
        scores: dict[str, Any] = {"value": value, "spread": spread}
        if real is not None and "floor" in self.checks:
            halves = split_real_halves(real, protocol.seed)
            if min(half.count for half in halves) > 1:
                scores["floor"] = score(metric, protocol, *halves)[0]
                scores["floor_counts"] = [half.count for half in halves]
        if real is not None and "shuffled" in real.rows:
            scores["shuffled"] = score(metric, protocol, real, replace(real, rows={PLAIN: real.rows["shuffled"]}))[0]
        if "frame" in self.reports:
            scores |= self._score_along(metric, protocol, real, fake, value)
        return scores

    def _score_along(
        self, metric: Metric, protocol: Protocol, real: FeatureSet | None, fake: FeatureSet, value: float
    ) -> dict[str, Any]:
        """Returns the value by the length of the clip or, for frames, by their position in it."""

        def part(side: FeatureSet | None, name: str) -> FeatureSet | None:
            return side and replace(side, rows={PLAIN: side.rows[name]})

        if metric.unit == "clip":
            lengths = {n: score(metric, protocol, part(real, f"first{n}"), part(fake, f"first{n}"))[0]  # type: ignore[arg-type]
                       for n in self._list_lengths(metric)}  # fmt: skip
            return {"by_length": lengths | {metric.frames: value}}
        places = np.concatenate([np.asarray(window.indices) for window in fake.windows])
        shown = np.unique(np.linspace(0, places.max(), POSITIONS).round().astype(int))
        enough = [place for place in shown.tolist() if (places == place).sum() >= SPLITS]
        rows = fake.rows[PLAIN]
        at = {place: replace(fake, rows={PLAIN: rows[torch.from_numpy(places == place)]}) for place in enough}
        return {"by_frame": {place: score(metric, protocol, real, each)[0] for place, each in at.items()}}


def _list_sides(metric: Metric) -> list[str]:
    return [side for side in ("real", "fake") if getattr(metric, f"num_{side}") != 0]


def score(metric: Metric, protocol: Protocol, real: FeatureSet | None, fake: FeatureSet) -> Score:
    """Returns the metric of two sets of features, and its deviation if it is a mean over subsets or splits."""
    if metric.kind == "inception_score":
        return inception_score(fake.rows[PLAIN], splits=SPLITS, shuffle_seed=metric.shuffle_seed)
    assert real is not None  # a distance has two sides
    if metric.kind == "kernel":
        x, y = real.rows[PLAIN], fake.rows[PLAIN]
        value, spread = kernel_distance(x, y, subsets=SUBSETS, subset_size=SUBSET_SIZE, seed=protocol.seed)
        return value, None if len(x) == len(y) <= SUBSET_SIZE else spread  # each subset is the whole set
    if protocol.divisor == "n" and not (real.moments or fake.moments):
        return frechet_distance(real.rows[PLAIN], fake.rows[PLAIN]), None
    return frechet_from_moments(sum_moments(real), sum_moments(fake), protocol.divisor), None


def sum_moments(features: FeatureSet) -> Moments:
    """Returns the moments of all items."""
    if features.moments:
        return sum(features.moments[1:], features.moments[0])
    rows = features.rows[PLAIN]
    moments = Moments(rows.shape[1])
    for part in rows.split(MOMENT_ROWS):
        moments.add(part)
    return moments


def split_real_halves(features: FeatureSet, seed: int) -> tuple[FeatureSet, FeatureSet]:
    """Splits the clips into two random halves of equal size; no clip has frames in both."""
    clips, rows = features.clips(), features.rows[PLAIN]
    if features.moments:  # of fixed halves
        parts = split_halves([window.clip for window in features.windows], seed=0)
    else:
        parts = split_halves(clips, seed)
        parts = (parts[0], parts[1][: len(parts[0])])
    first, second = (FeatureSet({PLAIN: rows[torch.from_numpy(np.isin(clips, some))]}) for some in parts)
    for half, moments in zip((first, second), features.moments):
        half.moments = [moments]
    return first, second


def _store(cache: FeatureCache, *entry: Any) -> None:
    """Stores an entry; only warns if the cache cannot be written."""
    try:
        cache.store(*entry)
    except OSError as error:
        log.warning("the cache %s cannot be written (%s): see --cache_dir", cache.folder, error.strerror or error)


# ------------------------------------------------------------------------------------------- summaries


def _summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns means over the seeds; the deviation is that of a sample (divided by one less than the seeds)."""
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


def _require_usable(evaluation: Evaluation, metric: Metric, sets: Mapping[str, FeatureSet]) -> None:
    """Raises ValueError if the sides differ in size, or one has too few items for the metric."""
    _require_same_size({side: features.size for side, features in sets.items()})
    for side, features in sets.items():
        _require_enough(metric, evaluation.source(side), features.count)


def _require_same_size(sizes: Mapping[str, tuple[int, int] | None]) -> None:
    known = {side: size for side, size in sizes.items() if size}
    if len(set(known.values())) > 1:
        said = " and ".join(f"the {side} ones {width}x{height}" for side, (height, width) in known.items())
        raise ValueError(f"the frames differ in size, {said}: give --resolution, to which all are cropped and resized")


def _require_enough(metric: Metric, source: Source, count: int) -> None:
    fewest = SPLITS if metric.kind == "inception_score" else 2
    if count < fewest:
        raise ValueError(
            f"'{source.root}' has {count} {metric.unit}{'s' * (count != 1)} that can be used, but {metric.name} needs "
            f"{fewest} or more"
        )


def _count_clips(source: Source, metric: Metric, sets: Sequence[FeatureSet]) -> dict[str, Any]:
    """Counts the clips of one side: found, used (the minimum over seeds) and left out (in any seed)."""
    dropped, size = _list_dropped(sets), sets[0].size
    return {
        "used": min(features.count for features in sets),
        "unit": metric.unit,
        "clips_used": min(len({window.clip for window in features.windows}) for features in sets),
        "clips_found": len(source.clips),
        **{reason: len(names) for reason, names in dropped.items()},
        "height": size[0] if size else None,
        "width": size[1] if size else None,
    }


def _list_dropped(sets: Sequence[FeatureSet]) -> dict[str, dict[str, str]]:
    """Lists every clip that was left out in any seed, with the reason, and those used although cut off."""
    merged: dict[str, dict[str, str]] = {}
    for note in ("unreadable", "short", "cut_off"):
        merged["too_short" if note == "short" else note] = {
            name: reason for features in sets for name, reason in sorted(getattr(features, note).items())
        }
    return merged


def _list_warnings(
    evaluation: Evaluation, metric: Metric, protocol: Protocol, counts: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """Lists reservations about the value, a sentence each. `counts`: of `_count_clips`, by side."""
    used = {side: each["used"] for side, each in counts.items()}
    found = [*_list_count_warnings(metric, protocol, used), *_list_data_warnings(evaluation, protocol, counts)]
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


def _list_count_warnings(metric: Metric, protocol: Protocol, counts: Mapping[str, int]) -> list[str]:
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


def _is_same_place(*sources: Source) -> bool:
    return len({Path(source.root).resolve() for source in sources}) == 1


def _list_data_warnings(
    evaluation: Evaluation, protocol: Protocol, counts: Mapping[str, Mapping[str, Any]]
) -> list[str]:  # fmt: skip
    found = []
    for side, each in counts.items():
        dropped = [f"{each['unreadable']} unreadable", f"{each['too_short']} too short"]
        if each["unreadable"] or each["too_short"]:
            found.append(f"{side} clips were left out: {', '.join(dropped)}; the result file names them")
        if each["cut_off"]:
            found.append(f"{each['cut_off']} {side} files are cut off or damaged, and were used as far as they go")
    if "real" in counts and evaluation.real and _is_same_place(evaluation.real, evaluation.fake):
        found.append(f"real and fake clips are the same, '{evaluation.fake.root}': the value judges no sample")
    words = {word.lower() for word in PurePath(evaluation.real.root).parts} if evaluation.real else set()
    if "real" in counts and protocol.split == "train" and words & {"test", "val", "valid", "validation"}:
        found.append(f"'{evaluation.real.root}' does not look like the training split that is stated: see --split")  # type: ignore[union-attr]
    lossy = sum(PurePath(clip.name).suffix.lower() in VIDEO_SUFFIXES for clip in evaluation.fake.clips)
    if lossy and protocol.fake_storage == "as read":
        found.append("the fakes are video files, whose losses count against them: score the lossless arrays")
    return found
