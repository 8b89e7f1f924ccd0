"""Measurements of given frames: no error in real clips, and a known shift."""

import numpy as np
import pytest

from demo.given import CASES, Case, draw_real_clips, format_table, measure, position_errors


def test_real_clips_are_right_and_without_seams() -> None:
    clips, labels = draw_real_clips(8)
    found = measure(clips, clips, labels, Case((0,), 32), window=16)
    assert list(found.values())[:4] == [1.0, 1.0, 0.0, 0.0]
    assert found["seam_ratio"] == pytest.approx(1.0, abs=0.2)
    assert "| 0.0 | 0.0 |" in format_table({"real": found})


def test_a_shifted_body_has_the_distance_of_the_shift() -> None:
    clips, labels = draw_real_clips(8)
    moved = clips.copy()
    moved[:, 5:] = np.roll(clips[:, 5:], (1, 1), axis=(2, 3))  # one pixel down, one to the right
    moved[:, 5:, :1], moved[:, 5:, :, :1] = moved[:, 5:, 1:2], moved[:, 5:, :, 1:2]
    errors = position_errors(moved[:, :16], clips[:, :16])
    assert errors[:, :5].max() < 1e-9
    np.testing.assert_allclose(errors[:, 5:], 2**0.5, atol=0.3)
    found = measure(moved[:, :16], clips, labels, Case((0, 1, 2, 3, 4), 16), window=16)
    assert found["next_error"] == pytest.approx(2**0.5, abs=0.3)
    assert np.isinf(position_errors(np.zeros_like(clips), clips)).all()  # no body at all


def test_the_cases_are_those_of_training() -> None:
    for case in CASES.values():
        assert len(case.given) <= 8 and set(case.given) < set(range(case.frames))
