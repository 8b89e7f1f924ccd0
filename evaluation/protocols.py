"""Metrics, protocols and data set presets.

A metric defines the detector, and the number and length of clips; a protocol, their selection and preprocessing.
Together they determine the rules of a side.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

ALL = None  # as a count
SAME = -1  # as a count of real items: as many as fakes


@dataclass(frozen=True)
class Metric:
    """Kind, detector family, and number and length of the clips of a metric."""

    kind: str  # frechet, kernel or inception_score
    family: str  # listed in `DetectorSpec.metrics` of its detectors
    unit: str  # of an item, "clip" or "frame"
    num_real: int | None  # maximum number of items; ALL; 0: side not used
    num_fake: int | None = ALL
    frames: int = 1  # per clip, as the detector gets it
    subsample: int = 1  # stride of these frames, on both sides
    shuffle_seed: int | None = None  # of samples, before splitting (inception score)
    name: str = ""

    @property
    def sides(self) -> list[str]:
        """The sides to read: ["fake"] or ["real", "fake"]."""
        return ["real", "fake"] if self.num_real != 0 else ["fake"]


_CLIP = r"(?P<n>\d+k?)_(?P<f>\d+)f(_subsample(?P<s>\d+)f)?"
FAMILIES = {  # pattern of the name -> metric; n may end in k, for thousands
    rf"fvd{_CLIP}": Metric("frechet", "fvd", "clip", SAME),
    rf"kvd{_CLIP}": Metric("kernel", "kvd", "clip", SAME),
    r"fid(?P<n>\d+k?)_full": Metric("frechet", "fid", "frame", ALL),
    r"kid(?P<n>\d+k?)_full": Metric("kernel", "kid", "frame", 1_000_000),
    r"fid(?P<n>\d+k?)": Metric("frechet", "fid", "frame", SAME),
    r"kid(?P<n>\d+k?)": Metric("kernel", "kid", "frame", SAME),
    r"is(?P<n>\d+k?)": Metric("inception_score", "is", "frame", 0),
    r"isv(?P<n>\d+k?)_ucf": Metric("inception_score", "isv", "clip", 0, frames=16, shuffle_seed=42),
}
OFFICIAL = (
    "fvd2048_16f", "fvd2048_128f", "fvd2048_128f_subsample8f", "kvd2048_16f", "fid50k_full", "kid50k_full", "is50k",
    "isv2048_ucf", "fid50k", "kid50k",
)  # fmt: skip


def parse_metric(name: str) -> Metric:
    """Returns the metric `name`: one of OFFICIAL, or one with other numbers (`fvd64_16f`). Raises: ValueError."""
    found = [(model, match) for pattern, model in FAMILIES.items() if (match := re.fullmatch(pattern, name))]
    if not found:
        near = [each for each in OFFICIAL if name and each.startswith(name)] or get_close_matches(name, OFFICIAL, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise ValueError(
            f"--metrics: '{name}' is unknown; use one of {', '.join(OFFICIAL)}, or one with other numbers "
            f"(fvd64_16f, fid5k_full){hint}"
        )
    model, numbers = found[0][0], found[0][1].groupdict()
    count = int(numbers["n"].removesuffix("k")) * (1000 if numbers["n"].endswith("k") else 1)
    length, subsample = int(numbers.get("f") or model.frames), int(numbers.get("s") or 1)
    if count < 2 or length < 1 or subsample < 1:
        raise ValueError(f"--metrics: '{name}' needs at least 2 items, of at least 1 frame")
    if length % subsample:
        raise ValueError(f"--metrics: '{name}': {length} frames are not divisible by the stride {subsample}")
    real = count if model.num_real == SAME else model.num_real
    frames = length // subsample
    return replace(model, name=name, num_real=real, num_fake=count, frames=frames, subsample=subsample)


@dataclass(frozen=True)
class SideRules:
    """Selection and preprocessing of the items of one side, built by `Protocol.side`."""

    unit: str  # clip or frame
    count: int | None  # maximum number of items; None: all
    frames: int  # per clip; videos shorter than frames x stride are left out
    stride: int
    offset: str  # "start", or "uniform": drawn from 0 to (video length) - frames x stride + stride - 1
    selection: str  # "first" by name, or "random"
    crop: str  # a key of `pixels.CROPS`
    resolution: int | None  # None: frames keep their size
    storage: str  # lossy storage before the detector: a key of `pixels.STORAGE`
    seed: int | None  # of offsets and selection; None if neither is random

    @property
    def whole(self) -> SideRules:
        """The same rules for all items, independent of seed and count."""
        return replace(self, count=ALL, selection="first", seed=None)

    def allows(self, windows: Sequence[Any]) -> bool:
        """Returns whether `windows` (of `sources.Window`) have at most `count` items."""
        items = len(windows) if self.unit == "clip" else sum(window.frames for window in windows)
        return self.count is ALL or items <= self.count

    @property
    def span(self) -> int:
        """Length of the shortest usable video, in frames."""
        return self.frames * self.stride


@dataclass(frozen=True)
class Protocol:
    """Selection and preprocessing of the clips of both sides; see SideRules."""

    name: str
    dataset: str | None = None
    split: str = "train"  # of the real data; for the report, not checked
    real_stride: int = 1
    fake_stride: int = 1
    real_offset: str = "uniform"
    fake_offset: str = "start"
    selection: str = "first"
    crop: str = "resize_then_center_crop"
    resolution: int | None = None
    real_storage: str = "as read"
    fake_storage: str = "as read"
    divisor: str = "n"  # of the covariances
    changed: tuple[str, ...] = ()  # settings that differ from the named protocol

    def side(self, side: str, metric: Metric, seed: int) -> SideRules:
        """Returns the rules of the "real" or "fake" side for a metric. Strides multiply; frame metrics use stride 1."""
        count = getattr(metric, f"num_{side}")
        stride, offset = getattr(self, f"{side}_stride") * metric.subsample, getattr(self, f"{side}_offset")
        if metric.unit == "frame":
            stride, offset = 1, "start"
        drawn = offset == "uniform" or (self.selection == "random" and count is not ALL)
        return SideRules(
            unit=metric.unit,
            count=count,
            frames=metric.frames,
            stride=stride,
            offset=offset,
            selection=self.selection,
            crop=self.crop,
            resolution=self.resolution,
            storage=getattr(self, f"{side}_storage"),
            seed=seed if drawn else None,
        )


# The official code takes every third real frame (Taichi: every sixth), and every fake frame.
LATTE = Protocol("latte", real_stride=3, selection="random", crop="center_crop_then_resize")
PUBLISHED = {"real_storage": "jpeg75", "fake_storage": "mp4 quality 9, jpeg75"}
PROTOCOLS = {
    "stylegan-v": Protocol("stylegan-v"),
    "latte": LATTE,
    "latte-published": replace(LATTE, name="latte-published", **PUBLISHED),  # type: ignore[arg-type]
}
# Real stride of the Latte protocols, by data set; all use 256 x 256 pixels and the training split.
LATTE_STRIDES = {"ffs": 3, "sky": 3, "ucf101": 3, "taichi": 6}
PRESET_RESOLUTION = 256


def build_protocol(name: str, dataset: str | None = None, **settings: Any) -> Protocol:
    """Returns the protocol `name`, updated by the preset of `dataset`, then by `settings` that are not None."""
    tables: Sequence[tuple[str, str | None, Mapping[str, Any]]] = (
        ("--protocol", name, PROTOCOLS),
        ("--dataset", dataset, LATTE_STRIDES),
    )
    for flag, value, table in tables:
        if value is not None and value not in table:
            raise ValueError(f"{flag}: '{value}' is unknown, use one of {', '.join(table)}")
    protocol = PROTOCOLS[name]
    if dataset is not None:
        stride = LATTE_STRIDES[dataset] if name.startswith("latte") else protocol.real_stride
        protocol = replace(protocol, dataset=dataset, resolution=PRESET_RESOLUTION, real_stride=stride)
    given = {key: value for key, value in settings.items() if value is not None}
    for key in ("real_stride", "fake_stride", "resolution"):
        if given.get(key, 1) < 1:
            raise ValueError(f"--{key} is {given[key]}, but must be at least 1")
    named = ("real_stride", "fake_stride", "selection", "divisor")  # changing other settings needs no warning
    changed = tuple(f"{key}={given[key]}" for key in named if key in given and given[key] != getattr(protocol, key))
    return replace(protocol, changed=changed, **given)
