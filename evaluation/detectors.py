"""Detectors: the networks whose features the metrics compare.

They are read from local files, identified by SHA-256, and never downloaded.

Letters: B samples, T frames per clip, H W height and width in pixels, D features or classes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.convert import read_state_dict

from .stand_in import KEY, StandIn
from .torchscript import is_torchscript, load_torchscript, read_bytes

_DROPBOX = "https://www.dropbox.com/s"
_NVIDIA = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics"
# usual file name, download source, and SHA-256 pinned by published projects (sources: docs/metrics.md)
_I3D = (
    "i3d_torchscript.pt",
    f"{_DROPBOX}/ge9e5ujwgetktms/i3d_torchscript.pt (StyleGAN-V; mirror: huggingface.co/flateon/FVD-I3D-torchscript)",
    "bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2",
)
_C3D = ("c3d_ucf101.pt", f"{_DROPBOX}/jxpu7avzdc9n97q/c3d_ucf101.pt (StyleGAN-V)", None)
_INCEPTION = (
    "inception-2015-12-05.pt",
    f"{_NVIDIA}/inception-2015-12-05.pt (NVIDIA)",
    "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
)
_MOBILENET = (
    "mobilenet_v2-b0353104.pth",
    "https://download.pytorch.org/models/mobilenet_v2-b0353104.pth (torchvision)",
    "b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889",
)


@dataclass(frozen=True)
class DetectorSpec:
    """Specification of a detector."""

    name: str
    metrics: tuple[str, ...]  # values of `Metric.family` that it supports
    file: str  # usual file name
    origin: str
    sha256: str | None  # of the usual file; another one works, with a warning
    input: str  # clip or frame
    dims: int  # D
    arguments: Mapping[str, bool] = field(default_factory=dict)  # extra arguments of forward
    frames: tuple[int, int | None] = (1, None)  # minimum and maximum per clip
    stand_in: str | None = None  # `StandIn.kind`; None: a TorchScript network


_I3D_CALL = {"rescale": True, "resize": True, "return_features": True}
DETECTORS = {
    spec.name: spec
    for spec in (
        DetectorSpec("i3d", ("fvd", "kvd"), *_I3D, "clip", 400, _I3D_CALL, frames=(10, None)),
        DetectorSpec("c3d", ("isv",), *_C3D, "clip", 101, frames=(16, 16)),
        DetectorSpec("inception", ("fid", "kid"), *_INCEPTION, "frame", 2048, {"return_features": True}),
        DetectorSpec("inception_is", ("is",), *_INCEPTION, "frame", 1008, {"no_output_bias": True}),
        DetectorSpec("mobilenet_v2_clip", ("fvd", "kvd"), *_MOBILENET, "clip", 640, frames=(2, None), stand_in="clip"),
        DetectorSpec("mobilenet_v2", ("fid", "kid"), *_MOBILENET, "frame", 1280, stand_in="frame"),
        DetectorSpec("mobilenet_v2_is", ("is",), *_MOBILENET, "frame", 1000, stand_in="probabilities"),
    )
}


def find_spec(name: str, key: str) -> DetectorSpec:
    """Returns the detector named `name`. Raises ValueError, naming `key`, if there is none."""
    if name not in DETECTORS:
        raise ValueError(f"{key}: there is no detector '{name}'; use one of {', '.join(DETECTORS)}.")
    return DETECTORS[name]


@dataclass(frozen=True)
class DetectorFile:
    """Contents of a detector file: a TorchScript network, or weights for a stand-in."""

    path: Path
    sha256: str
    network: Any = None
    weights: Mapping[str, Tensor] | None = None

    @classmethod
    def read(cls, path: str | Path, *, sha256: str | None = None, spec: DetectorSpec | None = None) -> DetectorFile:
        """Reads and checks a file; `sha256` is the required hash, `spec` the required detector (None: any).

        Raises: FileNotFoundError or ValueError, naming the file and where to get it.
        """
        path = Path(path)
        origin = spec.origin if spec else "the address in docs/metrics.md"
        content, digest = read_bytes(path, origin, sha256)
        wants_weights = spec.stand_in if spec else not is_torchscript(content) and path.suffix != ".pkl"
        if not wants_weights:
            return cls(path, digest, network=load_torchscript(content, path, origin))
        if is_torchscript(content):
            raise ValueError(f"{path} is a TorchScript file, but weights are needed: get them from {origin}.")
        try:
            return cls(path, digest, weights=read_state_dict(path))
        except ValueError as error:
            needed = "" if spec else "a TorchScript network, nor "
            raise ValueError(f"{path} is not {needed}weights for a stand-in: get one from {origin}.") from error

    @property
    def arguments(self) -> dict[str, bool]:
        """Maps arguments of the network's forward to whether they have a default; empty for weights."""
        arguments = self.network.forward.schema.arguments[1:] if self.network is not None else []
        return {argument.name: argument.has_default_value() for argument in arguments}

    def fits(self, spec: DetectorSpec) -> bool:
        """Returns whether the network takes the arguments of `spec`, or the weights are for its stand-in."""
        if spec.stand_in or self.network is None:
            return bool(spec.stand_in and self.weights and KEY in self.weights)
        required = {name for name, has_default in self.arguments.items() if not has_default}
        return set(spec.arguments) <= set(self.arguments) and len(required - set(spec.arguments)) <= 1

    def kinds(self) -> list[DetectorSpec]:
        """Returns all detectors that the file can be, judging by its arguments. Raises: ValueError if there is none."""
        found = []
        for spec in filter(self.fits, DETECTORS.values()):
            needed = {name for each in DETECTORS.values() if each.file == spec.file for name in each.arguments}
            if spec.stand_in or (needed <= set(self.arguments) if needed else len(self.arguments) == 1):
                found.append(spec)
        if not found:
            raise ValueError(f"{self.path} is none of the detectors {', '.join(DETECTORS)}: {self.describe()}.")
        return found

    def describe(self) -> str:
        """Describes the contents for error messages."""
        return f"its forward takes ({', '.join(self.arguments)})" if self.arguments else "it holds other weights"


class Detector:
    """Maps uint8 pixels to features or class probabilities.

    Runs in fp32 without TF32, with the same kernels in every call, regardless of global PyTorch settings.
    """

    def __init__(self, spec: DetectorSpec, file: DetectorFile, device: torch.device | str = "cpu") -> None:
        if not file.fits(spec):
            raise ValueError(f"{file.path} is not {spec.file}, the detector {spec.name}: {file.describe()}.")
        self.spec, self.path, self.sha256 = spec, file.path, file.sha256
        self.name, self.dims, self.input = spec.name, spec.dims, spec.input
        self.device = torch.device(device)
        network = file.network if file.weights is None else StandIn(str(spec.stand_in), file.weights, file.path)
        self.network = network.to(self.device)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Maps uint8 clips (B, T, 3, H, W) or frames (B, 3, H, W), according to `input`, to float32 (B, D) on the CPU.

        Raises: ValueError for another dtype, shape or number of frames, or if features are not finite or not (B, D).
        """
        self._check(pixels)
        pixels = pixels.to(self.device)
        if self.input == "clip":
            pixels = pixels.transpose(1, 2).contiguous()  # (B, 3, T, H, W)
        features = self.run(pixels, **self.spec.arguments)
        if tuple(features.shape) != (len(pixels), self.dims) or not features.isfinite().all():
            raise ValueError(
                f"{self.path}: {self.name} must give finite features ({len(pixels)}, {self.dims}) for {len(pixels)} "
                f"{self.input}s, but gave shape {tuple(features.shape)} or non-finite values: it is not the expected "
                "network."
            )
        return features

    @torch.inference_mode()
    def run(self, pixels: Tensor, **arguments: bool) -> Tensor:
        """Runs the network with `arguments` and without checks; returns float32 on the CPU."""
        # forward, not __call__: that would also run hooks, which the check of the file does not see
        try:
            with _full_precision(self.device):
                return self.network.forward(pixels, **arguments).float().cpu()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise ValueError(f"{self.path}: {self.name} cannot take {tuple(pixels.shape)}: {reason}") from error

    def _check(self, pixels: Tensor) -> None:
        shape = "(B, T, 3, H, W)" if self.input == "clip" else "(B, 3, H, W)"
        if pixels.dtype != torch.uint8:
            raise ValueError(f"{self.name} takes uint8 pixels of 0 to 255, which it rescales, not {pixels.dtype}.")
        if pixels.ndim != len(shape.split(",")) or pixels.shape[-3] != 3 or not pixels.numel():
            raise ValueError(f"{self.name} takes {self.input}s {shape}, not {tuple(pixels.shape)}.")
        fewest, most = self.spec.frames
        if self.input == "clip" and not fewest <= pixels.shape[1] <= (most or pixels.shape[1]):
            wanted = f"{fewest}" if most == fewest else f"{fewest} or more"
            raise ValueError(f"{self.name} takes clips of {wanted} frames, not {pixels.shape[1]}.")


def load_detector(
    name: str, path: str | Path, *, sha256: str | None = None, device: torch.device | str = "cpu"
) -> Detector:
    """Loads a detector of `DETECTORS` from its file; `sha256` is the required hash (None: any).

    Raises: FileNotFoundError, saying where to get it; ValueError for another hash or detector.
    """
    return Detector(DETECTORS[name], DetectorFile.read(path, sha256=sha256, spec=DETECTORS[name]), device)


def read_detector_files(given: Sequence[str]) -> list[tuple[DetectorSpec, DetectorFile]]:
    """Reads the files of `--detector [NAME=]FILE[@SHA256]`; returns each with every detector that it can be."""
    found: list[tuple[DetectorSpec, DetectorFile]] = []
    for text in given:
        match = re.fullmatch(r"(?:(?P<name>\w+)=)?(?P<file>.+?)(?:@(?P<sha256>[0-9a-fA-F]{64}))?", text)
        name, path, sha256 = match.groups() if match else (None, text, None)
        spec = find_spec(name, "--detector") if name is not None else None
        file = DetectorFile.read(path, sha256=sha256, spec=spec)
        found += [(each, file) for each in ([spec] if spec else file.kinds())]
    return found


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Disables TF32, autocast, cuDNN autotuning and TorchScript graph optimisation."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with (
            torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False),
            torch.autocast(device.type, enabled=False),
            torch.jit.optimized_execution(False),
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
