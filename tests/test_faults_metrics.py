"""G8, H7: what cannot be measured gives a sentence and no number, by the whole command and by the formula."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.detector_stubs import StubI3D, write_network
from tools import calc_metrics_for_dataset as command


class BrokenI3D(nn.Module):
    """NaN in one feature of dark clips."""

    def forward(self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False) -> Tensor:
        features = x.float().mean([1, 2, 3, 4])[:, None].repeat(1, 400)
        features[:, 7] = torch.log(features[:, 7] - 60.0)
        return features


def clips(folder: Path, count: int, *, dark: bool = False) -> Path:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(count)
    for number in range(count):
        np.save(folder / f"{number:06d}.npy", rng.integers(0, 30 if dark else 256, (16, 8, 8, 3), dtype=np.uint8))
    return folder


def measured(tmp_path: Path, real: Path, fake: Path, detector: Path, metric: str = "fvd16_16f") -> dict[str, object]:
    """The result of the command, all of whose files lie below `tmp_path`."""
    out = tmp_path / "result.json"
    sides = ["--real_data_path", str(real), "--fake_data_path", str(fake), "--detector", f"i3d={detector}"]
    more = ["--workers", "0", "--verbose", "0", "--checks", "none", "--protocol", "stylegan-v"]
    command.main([*sides, *more, "--metrics", metric, "--cache_dir", str(tmp_path / "cache"), "--out", str(out)])
    return json.loads(out.read_text())["metrics"][metric]


@pytest.fixture
def i3d(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    return write_network(StubI3D(), tmp_path / "i3d.pt")


@pytest.mark.parametrize("side", ["real", "fake"])
def test_G8_a_detector_that_gives_nan(tmp_path: Path, side: str, capsys: pytest.CaptureFixture[str]) -> None:
    broken = write_network(BrokenI3D(), tmp_path / "broken.pt")
    sides = {name: clips(tmp_path / name, 4, dark=name == side) for name in ("real", "fake")}
    with pytest.raises(ValueError, match=r"broken.pt: i3d must give finite .* or non-finite values"):
        measured(tmp_path, sides["real"], sides["fake"], broken)
    assert not (tmp_path / "result.json").exists()
    assert "fvd16_16f" not in capsys.readouterr().out


@pytest.mark.parametrize("counts", [(1, 4), (4, 1), (0, 4), (4, 0)])
def test_G8_fewer_than_two_clips(tmp_path: Path, i3d: Path, counts: tuple[int, int]) -> None:
    real, fake = clips(tmp_path / "real", counts[0]), clips(tmp_path / "fake", counts[1])
    with pytest.raises(ValueError) as error:
        measured(tmp_path, real, fake, i3d)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "result.json").exists()


@pytest.mark.parametrize("metric", ["fvd999999999999_16f", "fvd4_16f"])
def test_H7_the_number_of_clips_is_the_true_one(tmp_path: Path, i3d: Path, metric: str) -> None:
    real, fake = clips(tmp_path / "real", 6), clips(tmp_path / "fake", 5)
    found: Any = measured(tmp_path, real, fake, i3d, metric)
    used = (4, 4) if metric == "fvd4_16f" else (6, 5)
    assert (found["protocol"]["num_real"], found["protocol"]["num_fake"]) == used
    assert (found["counts"]["real"]["used"], found["counts"]["fake"]["used"]) == used


def test_G8_a_cache_of_another_hash_is_not_used(tmp_path: Path, i3d: Path) -> None:
    """Neither of another detector under the same name, nor of other files, nor one that was tampered with."""
    real, fake = clips(tmp_path / "real", 5), clips(tmp_path / "fake", 6)
    first = measured(tmp_path, real, fake, i3d)["value"]
    entries = sorted((tmp_path / "cache").rglob("*.safetensors"))
    assert entries
    torch.manual_seed(9)
    other = measured(tmp_path, real, fake, write_network(StubI3D(), i3d))["value"]
    assert other != first
    np.save(real / "000000.npy", np.zeros((16, 8, 8, 3), np.uint8))
    changed = measured(tmp_path, real, fake, i3d)["value"]
    assert changed not in (first, other)
    for entry in (tmp_path / "cache").rglob("*.safetensors"):
        content = bytearray(entry.read_bytes())
        content[-5] ^= 0xFF
        entry.write_bytes(content)
    assert measured(tmp_path, real, fake, i3d)["value"] == changed
