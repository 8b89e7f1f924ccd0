"""Computes metrics from the features of both sides, with spread, floor and sensitivity to frame order."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch

from engine.distributed import broadcast_object, on_main

from .cache import FeatureCache, build_cache_key
from .detectors import Detector
from .distances import Moments, frechet_distance, frechet_from_moments, inception_score, kernel_distance
from .extract import PLAIN, SHUFFLED, Extractor, FeatureSet, split_halves
from .manifest import Manifest
from .protocols import Metric, Protocol, SideRules
from .report import list_library_versions, list_warnings
from .sources import NOTES, Source, find_first_size

CHECKS = ("floor", "shuffle")
REPORTS = ("clip", "frame")
LENGTHS = [16 << power for power in range(20)]  # numbers of first frames that the `frame` report evaluates
POSITIONS = 16  # maximum number of frame positions that the `frame` report evaluates
SPLITS, SUBSETS, SUBSET_SIZE = 10, 100, 1000
MOMENT_ROWS = 4096
MAX_ROWS = 50_000  # real frames above which only moments and a sample of this size are kept


@dataclass
class Evaluation:
    """Comparison of two sources."""

    sources: Mapping[str, Source]  # "fake", and "real" if a metric needs it
    protocol: Protocol
    detectors: Mapping[str, Detector]  # by `Metric.family`
    extractor: Extractor
    cache: FeatureCache | None = None  # of real features; None: no cache
    manifest: Manifest | None = None  # windows to read in place of those of the rules
    checks: Sequence[str] = CHECKS
    reports: Sequence[str] = ("clip",)  # subset of REPORTS
    known: dict[tuple[Any, ...], FeatureSet] = field(default_factory=dict)
    read: dict[tuple[str, SideRules], FeatureSet] = field(default_factory=dict)  # features used by the values

    def check_inputs(self, metrics: Sequence[Metric]) -> None:
        """Checks the first usable clip of each side for all metrics before anything is computed. Collective.

        Raises: ValueError if clips are too few, all too short or unreadable, or differ in size between the sides.
        """

        def check() -> None:
            for metric in metrics:
                clips = {side: len(self.sources[side].clips) for side in metric.sides if metric.unit == "clip"}
                sides = metric.sides if self.manifest is None else ()  # clips of a manifest are known to be usable
                rules = {side: self.protocol.side(side, metric, seed=0) for side in sides}
                sizes = {side: find_first_size(self.sources[side], own) for side, own in rules.items()}
                self._require_usable(metric, clips, sizes)

        on_main(check)

    def measure(self, metric: Metric, seeds: Sequence[int]) -> dict[str, Any]:
        """Returns the result-file entry of one metric; {} on ranks other than 0."""
        runs, scores = [], []
        for seed in seeds:
            rules = {side: self.protocol.side(side, metric, seed) for side in metric.sides}
            sets = {side: self.features(side, metric, own) for side, own in rules.items()}
            if self.extractor.world.is_main:
                items = {side: features.count for side, features in sets.items()}
                self._require_usable(metric, items, {side: features.size for side, features in sets.items()})
                runs.append(sets)
                scores.append(self._score_seed(metric, seed, sets))
            if all(own.seed is None or sets[side].whole for side, own in rules.items()):
                break  # nothing is random: all seeds give the same value
        if not runs:
            return {}
        by_side = {side: [sets[side] for sets in runs] for side in metric.sides}
        dropped = {side: _list_dropped(sets) for side, sets in by_side.items()}
        counts = {side: _count_clips(self.sources[side], metric, sets, dropped[side]) for side, sets in by_side.items()}
        detector = self.detectors[metric.family]
        sides = {side: self.protocol.side(side, metric, seed=0) for side in ("real", "fake")}
        values = _summarise(scores)
        return {
            **values,
            "detector": detector.name,
            "protocol": {
                **asdict(self.protocol),
                "unit": metric.unit,
                "frames": metric.frames,
                "seeds": list(seeds[: len(runs)]),
                **{f"{side}_{key}": getattr(own, key) for side, own in sides.items() for key in ("stride", "offset")},
                # at most the number in the metric's name
                **{f"num_{side}": counts[side]["used"] if side in counts else own.count for side, own in sides.items()},
            },
            "counts": counts,
            "dropped": dropped,
            "warnings": list(list_warnings(metric, self.protocol, detector, self.sources, counts, values)),
        }

    def _require_usable(
        self, metric: Metric, counts: Mapping[str, int], sizes: Mapping[str, tuple[int, int] | None]
    ) -> None:
        """Raises ValueError if the sides differ in size, or one has too few items for the metric."""
        known = {side: size for side, size in sizes.items() if size}
        if len(set(known.values())) > 1:
            said = " and ".join(f"the {side} ones {width}x{height}" for side, (height, width) in known.items())
            raise ValueError(f"the frames differ in size, {said}: give --resolution to crop and resize all of them")
        fewest = SPLITS if metric.kind == "inception_score" else 2
        for side, count in counts.items():
            if count < fewest:
                raise ValueError(
                    f"'{self.sources[side].root}' has {count} {metric.unit}{'s' * (count != 1)} that can be used, but "
                    f"{metric.name} needs {fewest} or more"
                )

    # ---- features ----------------------------------------------------------------------------------

    def features(self, side: str, metric: Metric, rules: SideRules) -> FeatureSet:
        """Returns the features of one side; identical requests are computed once."""
        detector = self.detectors[metric.family]
        variants = (PLAIN, *(f"first{length}" for length in self._list_lengths(metric)))
        if side == "real" and metric.unit == "clip" and "shuffle" in self.checks:
            variants = (*variants, SHUFFLED)
        max_rows = MAX_ROWS if side == "real" and metric.unit == "frame" else None
        request = (side, detector.name, variants, max_rows)
        for each in (rules.whole, rules):
            found = self.known.get((*request, each))
            if found and rules.allows(found.windows):
                break
        else:
            found = self._load_or_extract(side, rules, detector, variants, max_rows)
            each = rules.whole if found.whole else rules
            self.known[(*request, each)] = found
        self.read[side, each] = found
        return found

    def _list_lengths(self, metric: Metric) -> list[int]:
        """Lists the clip lengths to report: 16, 32, ... frames, below that of the metric."""
        is_reported = "frame" in self.reports and metric.unit == "clip"
        return [length for length in LENGTHS if is_reported and length < metric.frames]

    def _load_or_extract(
        self, side: str, rules: SideRules, detector: Detector, variants: tuple[str, ...], max_rows: int | None
    ) -> FeatureSet:
        """Loads features from the cache, or extracts them; only rank 0 gets the features."""
        source, world = self.sources[side], self.extractor.world
        cache = self.cache if side == "real" and world.is_main else None
        given, windows = self.manifest.find(side, rules) if self.manifest else (rules, None)
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
            cache.store(key(under), source, found, about)
        return found

    # ---- values ------------------------------------------------------------------------------------

    def _score_seed(self, metric: Metric, seed: int, sets: Mapping[str, FeatureSet]) -> dict[str, Any]:
        """Returns the value, checks and per-frame values of one seed."""
        real, fake = sets.get("real"), sets["fake"]

        def value(real: FeatureSet | None, fake: FeatureSet) -> float:
            return score(metric, self.protocol.divisor, seed, real, fake)[0]

        scores: dict[str, Any] = dict(zip(("value", "spread"), score(metric, self.protocol.divisor, seed, real, fake)))
        if real is not None and "floor" in self.checks:
            halves = split_real(real, seed, fake.count if metric.unit == "clip" else None)
            if min(half.count for half in halves) > 1:
                scores |= {"floor": value(*halves), "floor_counts": [half.count for half in halves]}
        if real is not None and SHUFFLED in real.rows:
            scores["shuffled"] = value(real, real.variant(SHUFFLED))
        if "frame" in self.reports and metric.unit == "clip":
            names = {length: f"first{length}" for length in self._list_lengths(metric)}
            lengths = {each: value(real and real.variant(name), fake.variant(name)) for each, name in names.items()}
            scores["by_length"] = lengths | {metric.frames: scores["value"]}
        elif "frame" in self.reports:
            places = np.concatenate([np.asarray(window.indices) for window in fake.windows])
            shown = np.unique(np.linspace(0, places.max(), POSITIONS).round().astype(int))
            enough = [place for place in shown.tolist() if (places == place).sum() >= SPLITS]
            at = {place: fake.rows[PLAIN][torch.from_numpy(places == place)] for place in enough}
            scores["by_frame"] = {place: value(real, replace(fake, rows={PLAIN: at[place]})) for place in enough}
        return scores


def score(
    metric: Metric, divisor: str, seed: int, real: FeatureSet | None, fake: FeatureSet
) -> tuple[float, float | None]:
    """Returns the metric of two feature sets, and its standard deviation if it is a mean over subsets or splits."""
    if real is None:
        return inception_score(fake.rows[PLAIN], splits=SPLITS, shuffle_seed=metric.shuffle_seed)
    if metric.kind == "kernel":
        x, y = real.rows[PLAIN], fake.rows[PLAIN]
        value, spread = kernel_distance(x, y, subsets=SUBSETS, subset_size=SUBSET_SIZE, seed=seed)
        return value, None if len(x) == len(y) <= SUBSET_SIZE else spread  # every subset is the whole set
    if divisor == "n" and not (real.moments or fake.moments):
        return frechet_distance(real.rows[PLAIN], fake.rows[PLAIN]), None
    return frechet_from_moments(sum_moments(real), sum_moments(fake), divisor), None


def sum_moments(features: FeatureSet) -> Moments:
    """Returns the moments of all items."""
    if features.moments:
        return sum(features.moments[1:], features.moments[0])
    rows = features.rows[PLAIN]
    moments = Moments(rows.shape[1])
    for part in rows.split(MOMENT_ROWS):
        moments.add(part)
    return moments


def split_real(features: FeatureSet, seed: int, limit: int | None) -> tuple[FeatureSet, FeatureSet]:
    """Returns the rows of two random sets of at most `limit` clips, by default halves; no clip has rows in both."""
    clips, rows = features.clips(), features.rows[PLAIN]
    if features.moments:  # fixed halves, as in the extraction
        parts = split_halves([window.clip for window in features.windows], seed=0)
    else:
        parts = split_halves(clips, seed)
        parts = (parts[0][:limit], parts[1][: len(parts[0])][:limit])
    first, second = (FeatureSet({PLAIN: rows[torch.from_numpy(np.isin(clips, some))]}) for some in parts)
    for half, moments in zip((first, second), features.moments):
        half.moments = [moments]
    return first, second


# ---- summaries -----------------------------------------------------------------------------------------


def _summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns means over seeds, and the sample standard deviation (divisor: seeds - 1)."""
    values = [run["value"] for run in runs]
    std = statistics.stdev(values) if len(values) > 1 else None
    entry: dict[str, Any] = {"value": statistics.fmean(values), "std": std, "values": values}
    for key, first in runs[0].items():
        if key == "floor_counts":
            entry[key] = first
        elif isinstance(first, dict):
            entry[key] = {place: statistics.fmean(run[key][place] for run in runs) for place in first}
        elif key != "value" and first is not None:
            entry[key] = statistics.fmean(run[key] for run in runs)
    return entry


def _list_dropped(sets: Sequence[FeatureSet]) -> dict[str, dict[str, str]]:
    """Lists by reason every clip left out for any seed, and the cut-off clips that were used."""
    dropped: dict[str, dict[str, str]] = {}
    for note in NOTES:
        found = [pair for features in sets for pair in sorted(features.notes[note].items())]
        dropped["too_short" if note == "short" else note] = dict(found)
    return dropped


def _count_clips(
    source: Source, metric: Metric, sets: Sequence[FeatureSet], dropped: Mapping[str, Mapping[str, str]]
) -> dict[str, Any]:
    """Counts the clips of one side: found, used (minimum over seeds) and left out (for any seed)."""
    height, width = sets[0].size or (None, None)
    return {
        "used": min(features.count for features in sets),
        "unit": metric.unit,
        "clips_used": min(len({window.clip for window in features.windows}) for features in sets),
        "clips_found": len(source.clips),
        **{reason: len(names) for reason, names in dropped.items()},
        "height": height,
        "width": width,
    }
