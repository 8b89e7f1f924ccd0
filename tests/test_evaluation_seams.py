"""Seams: one that is there is found, none that is not."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from evaluation.seams import frame_changes, main, seam_change
from tests.conftest import refuses


def drifting(videos: int = 8, frames: int = 20) -> np.ndarray:
    """Videos that change by one to three grey levels from frame to frame."""
    rng = np.random.default_rng(0)
    steps = rng.integers(1, 4, (videos, frames, 1, 1, 1))
    return (steps.cumsum(1) + rng.integers(0, 100, (videos, 1, 4, 4, 3))).astype(np.uint8)


def test_changes_are_mean_differences() -> None:
    videos = drifting()
    by_hand = [[np.mean(abs(b.astype(float) - a)) for a, b in pairwise(video)] for video in videos]
    np.testing.assert_allclose(frame_changes(videos), by_hand)


def test_an_artificial_seam_is_found_where_it_is() -> None:
    videos = drifting()
    assert abs(seam_change(videos, [8]).ratio - 1) < 4 * seam_change(videos, [8]).error
    videos[:, 8:] += 20
    found = seam_change(videos, [8])
    assert found.ratio > 8 and found.error < 1
    assert found.at_seams == pytest.approx(found.elsewhere * found.ratio)
    assert seam_change(videos, [9]).ratio < 1  # only there


def test_the_error_is_that_of_the_ratio() -> None:
    """Over many sets of videos the ratio scatters as much as the error says."""
    rng = np.random.default_rng(1)
    steps = rng.integers(1, 8, (300, 12, 10, 1, 1, 1))
    videos = steps.cumsum(2).repeat(2, axis=3).repeat(3, axis=5).astype(np.uint8)
    found = [seam_change(each, [4, 7]) for each in videos]
    scatter = np.std([each.ratio for each in found])
    assert scatter == pytest.approx(np.mean([each.error for each in found]), rel=0.15)


def test_the_command_reads_what_sampling_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    videos = drifting(3)
    videos[:, 8:] += 20
    for index, video in enumerate(videos):
        np.save(tmp_path / f"{index}.npy", video)
    files = {"videos": [{"file": f"{index}.npy"} for index in range(3)]}
    windows = {"windows": {"size": 8, "overlap": 2, "method": "autoregressive"}}  # seams at 8 and 14
    (tmp_path / "samples.json").write_text(json.dumps(files | windows))
    assert main([str(tmp_path)]) == 0
    ratio = float(capsys.readouterr().out.splitlines()[1].split()[-2])
    assert ratio == pytest.approx(seam_change(videos, [8, 14]).ratio, abs=0.01)
    (tmp_path / "samples.json").write_text(json.dumps(files))
    refuses("sampled in one window", main, [str(tmp_path)])
    refuses("not a folder of samples", main, [str(tmp_path / "nowhere")])
