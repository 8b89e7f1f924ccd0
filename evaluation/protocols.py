"""Metrics, protocols and presets of data sets.

A metric defines the detector and the number and length of the clips. A protocol defines the selection and the
preprocessing of the clips. Together they form a `Protocol`, which is recorded in every result.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from typing import Any

ALL = None  # as a count


@dataclass(frozen=True)
class Metric:
    """A metric.

    Args:
        kind: frechet, kernel or inception_score.
        family: its detectors have it in their `DetectorSpec.metrics`.
        unit: of an item, "clip" or "frame".
        num_real, num_fake: maximum of items; ALL, or 0 for an unused side.
        frames: frames of a clip for the detector.
        subsample: distance of these frames, on both sides.
        shuffle_seed: of the samples before they are split (inception score).
    """

    name: str
    kind: str
    family: str
    unit: str
    num_real: int | None
    num_fake: int | None
    frames: int = 1
    subsample: int = 1
    shuffle_seed: int | None = None


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("fvd2048_16f", "frechet", "fvd", "clip", 2048, 2048, 16),
        Metric("fvd2048_128f", "frechet", "fvd", "clip", 2048, 2048, 128),
        Metric("fvd2048_128f_subsample8f", "frechet", "fvd", "clip", 2048, 2048, 16, 8),
        Metric("kvd2048_16f", "kernel", "kvd", "clip", 2048, 2048, 16),
        Metric("fid50k_full", "frechet", "fid", "frame", ALL, 50_000),
        Metric("kid50k_full", "kernel", "kid", "frame", 1_000_000, 50_000),
        Metric("is50k", "inception_score", "is", "frame", 0, 50_000),
        Metric("isv2048_ucf", "inception_score", "isv", "clip", 0, 2048, 16, shuffle_seed=42),
    )
}
# Other numbers: pattern -> the metric that it varies. N may end in k, for thousands.
FAMILIES: tuple[tuple[str, str], ...] = (
    (r"fvd(?P<n>\d+k?)_(?P<f>\d+)f(_subsample(?P<s>\d+)f)?", "fvd2048_16f"),
    (r"kvd(?P<n>\d+k?)_(?P<f>\d+)f(_subsample(?P<s>\d+)f)?", "kvd2048_16f"),
    (r"fid(?P<n>\d+k?)_full", "fid50k_full"),
    (r"kid(?P<n>\d+k?)_full", "kid50k_full"),
    (r"is(?P<n>\d+k?)", "is50k"),
    (r"isv(?P<n>\d+k?)_ucf", "isv2048_ucf"),
)


def parse_metric(name: str) -> Metric:
    """Returns the metric of that name: one of METRICS, or one with other numbers (`fvd64_16f`, `fid5k_full`).

    Raises: ValueError for an unknown name.
    """
    if name in METRICS:
        return METRICS[name]
    for pattern, model in FAMILIES:
        match = re.fullmatch(pattern, name)
        if match:
            return _with_numbers(METRICS[model], name, **match.groupdict())
    near = [each for each in METRICS if name and each.startswith(name)] or get_close_matches(name, METRICS, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    raise ValueError(
        f"--metrics: '{name}' is unknown; there are {', '.join(METRICS)}, and these with other numbers "
        f"(fvd64_16f, fid5k_full){hint}"
    )


def _with_numbers(model: Metric, name: str, n: str, f: str | None = None, s: str | None = None) -> Metric:
    count = int(n.removesuffix("k")) * (1000 if n.endswith("k") else 1)
    length, subsample = int(f or model.frames), int(s or 1)
    if count < 2 or length < 1 or subsample < 1:
        raise ValueError(f"--metrics: '{name}' needs at least 2 items, of at least 1 frame")
    if length % subsample:
        raise ValueError(f"--metrics: '{name}': {length} frames cannot be taken every {subsample}th: not divisible")
    real = count if model.unit == "clip" and model.num_real else model.num_real
    return replace(
        model, name=name, num_real=real, num_fake=count, frames=length // subsample, subsample=subsample
    )  # fmt: skip


# ------------------------------------------------------------------------------------------- protocols


@dataclass(frozen=True)
class SideRules:
    """Selection and preprocessing of the items of one side, built by `Protocol.side`.

    Args:
        unit: clip or frame.
        count: maximum of items; None takes all.
        frames, stride: a clip is `frames` frames, `stride` apart; videos shorter than frames x stride are left out.
        offset: "start", or "uniform": drawn from 0 to L - frames x stride + stride - 1, both included, L being
            the length of the video.
        selection: "first" in the order of the names, or "random".
        crop, resolution: see `pixels.CROPS`; None leaves the frames as they are.
        storage: lossy storage before the detector: a key of `pixels.STORAGE`.
        seed: of offsets and selection; None if neither is random.
    """

    unit: str
    count: int | None
    frames: int
    stride: int
    offset: str
    selection: str
    crop: str
    resolution: int | None
    storage: str
    seed: int | None

    @property
    def whole(self) -> SideRules:
        """The rules that take all items, independent of seed and count."""
        return replace(self, count=ALL, selection="first", seed=None)

    def allows(self, windows: Sequence[Any]) -> bool:
        """Returns whether these windows (`sources.Window`) have at most `count` items."""
        items = len(windows) if self.unit == "clip" else sum(window.frames for window in windows)
        return self.count is ALL or items <= self.count

    @property
    def span(self) -> int:
        """Frames of the shortest usable video."""
        return self.frames * self.stride


@dataclass(frozen=True)
class Protocol:
    """All settings that a value depends on, apart from the files and the detector; see SideRules and Metric.

    `split` names the real data for the report, and cannot be checked. `changed` lists the settings that differ from the
    named protocol.
    """

    name: str
    dataset: str | None = None
    split: str = "train"
    unit: str = "clip"
    num_real: int | None = 2048
    num_fake: int | None = 2048
    frames: int = 16
    real_stride: int = 1
    fake_stride: int = 1
    real_offset: str = "uniform"
    fake_offset: str = "start"
    selection: str = "first"
    crop: str = "resize_then_center_crop"
    resolution: int | None = None
    real_storage: str = "as read"
    fake_storage: str = "as read"
    divisor: str = "n"
    seed: int = 0
    changed: tuple[str, ...] = ()

    def side(self, side: str) -> SideRules:
        """Returns the rules of the "real" or "fake" side."""
        own = {key: getattr(self, f"{side}_{key}") for key in ("stride", "offset", "storage")}
        count = getattr(self, f"num_{side}")
        offset = own["offset"] == "uniform" and self.unit == "clip"
        drawn = offset or (self.selection == "random" and count is not ALL)
        return SideRules(
            unit=self.unit,
            count=count,
            frames=self.frames,
            selection=self.selection,
            crop=self.crop,
            resolution=self.resolution,
            seed=self.seed if drawn else None,
            **own,
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the protocol for JSON."""
        return asdict(self)


LATTE = Protocol(
    "latte", real_stride=3, selection="random", crop="center_crop_then_resize"
)  # the code of Latte: real frames every third (Taichi: sixth), fakes as they are  # fmt: skip
PROTOCOLS: dict[str, Protocol] = {
    "stylegan-v": Protocol("stylegan-v"),
    "latte": LATTE,
    "latte-published": replace(
        LATTE, name="latte-published", real_storage="jpeg75", fake_storage="mp4 quality 9, jpeg75"
    ),
}
# Real stride of Latte's protocols, by data set; all are scored at 256 x 256 on the training split.
LATTE_STRIDES = {"ffs": 3, "sky": 3, "ucf101": 3, "taichi": 6}
PRESET_RESOLUTION = 256


def build_protocol(name: str, dataset: str | None = None, **settings: Any) -> Protocol:
    """Returns the protocol `name`, updated by the preset of `dataset`, then by `settings` that are not None.

    Raises: ValueError for an unknown name, or a setting out of range.
    """
    _known("--protocol", name, PROTOCOLS)
    protocol = PROTOCOLS[name]
    if dataset is not None:
        _known("--dataset", dataset, LATTE_STRIDES)
        stride = LATTE_STRIDES[dataset] if name.startswith("latte") else protocol.real_stride
        protocol = replace(protocol, dataset=dataset, resolution=PRESET_RESOLUTION, real_stride=stride)
    given = {key: value for key, value in settings.items() if value is not None}
    for key in ("real_stride", "fake_stride", "resolution"):
        if key in given and given[key] < 1:
            raise ValueError(f"--{key} is {given[key]}, but must be at least 1")
    named = ("real_stride", "fake_stride", "selection", "divisor")  # other settings are the caller's choice
    changed = tuple(f"{key}={given[key]}" for key in named if key in given and given[key] != getattr(protocol, key))
    return replace(protocol, changed=changed, **given)


def _known(flag: str, value: str, table: dict[str, Any]) -> None:
    if value not in table:
        raise ValueError(f"{flag}: '{value}' is unknown, use one of {', '.join(table)}")


def fill_protocol(metric: Metric, protocol: Protocol, seed: int) -> Protocol:
    """Returns `protocol` with the counts, frames and strides of `metric`, and one seed."""
    frames = metric.unit == "frame"
    return replace(
        protocol,
        unit=metric.unit,
        num_real=metric.num_real,
        num_fake=metric.num_fake,
        frames=1 if frames else metric.frames,
        real_stride=1 if frames else protocol.real_stride * metric.subsample,
        fake_stride=1 if frames else protocol.fake_stride * metric.subsample,
        real_offset="start" if frames else protocol.real_offset,
        seed=seed,
    )
