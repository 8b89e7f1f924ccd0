"""Networks with the call signatures of the real detectors, as TorchScript files made on the spot."""

from pathlib import Path

import torch
from torch import Tensor, nn


class StubI3D(nn.Module):
    """400 numbers that depend on every pixel and on the order of frames, on the range that the arguments say."""

    def __init__(self, dims: int = 400) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 8, (3, 5, 5), stride=(1, 4, 4))
        self.out = nn.Linear(8, dims)

    def forward(self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False) -> Tensor:
        x = x.float()
        if rescale:
            x = x / 255 * 2 - 1
        if resize:
            x = nn.functional.interpolate(x, [x.shape[2], 32, 32], mode="trilinear", align_corners=False)
        logits = self.out(torch.tanh(self.conv(x)).mean([2, 3, 4]))
        if return_features:
            return logits
        return logits.softmax(1)


class StubC3D(nn.Module):
    """Probabilities of 101 classes, of 16 frames and no other number."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(16 * 3, 101)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x.float().mean([3, 4]).flatten(1) / 64).softmax(1)


class StubInception(nn.Module):
    """2048 features, or probabilities of 1008 classes with or without the output's bias."""

    def __init__(self, dims: int = 2048, classes: int = 1008) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, dims, 4, stride=4)
        self.output = nn.Linear(dims, classes)

    def forward(
        self, img: Tensor, return_features: bool = False, use_fp16: bool = False, no_output_bias: bool = False
    ) -> Tensor:
        features = torch.relu(self.conv(img.float() / 128 - 1)).mean([2, 3])
        if return_features:
            return features
        if no_output_bias:
            return nn.functional.linear(features, self.output.weight).softmax(1)
        return self.output(features).softmax(1)


STUBS = {"i3d": StubI3D, "c3d": StubC3D, "inception": StubInception, "inception_is": StubInception}


def write_stub(name: str, folder: Path) -> Path:
    """The TorchScript file of the stub for detector `name`; the same weights every time."""
    torch.manual_seed(0)
    return write_network(STUBS[name](), folder / f"{name}.pt")


def write_network(network: nn.Module, file: Path) -> Path:
    torch.jit.script(network.eval()).save(str(file))
    return file
