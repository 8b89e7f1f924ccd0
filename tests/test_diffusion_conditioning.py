"""Given frames and windows: draws, losses and sampling against brute force and closed forms in float64."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from diffusion import (
    ConditionConfig,
    DiffusionConfig,
    GaussianDiffusion,
    Given,
    RectifiedFlow,
    build_diffusion,
    condition_denoiser,
    sample,
    sample_given,
)
from diffusion.windows import find_seams, fuse_windows, ramp, slide_windows, window_starts
from tests.conftest import refuses

SHAPE = (3, 6, 2, 4, 4)  # B F C H W
METHODS = {"ddpm": "epsilon", "ddim": "x_start", "euler": "flow", "heun": "flow"}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def process(prediction: str, steps: str = "", *, learn_sigma: bool = False) -> GaussianDiffusion | RectifiedFlow:
    config = DiffusionConfig(num_steps=50, prediction=prediction)
    return build_diffusion(config, learn_sigma=learn_sigma, respacing=steps)


def known(frames: list[list[int]]) -> Given:
    """Latents of which in clip b the frames `frames[b]` are known; the rest is NaN, which nothing may touch."""
    mask = torch.tensor([[place in places for place in range(SHAPE[1])] for places in frames])
    latents = randn(len(frames), *SHAPE[1:], seed=9)
    return Given(torch.where(mask[:, :, None, None, None], latents, torch.nan), mask)


def frame_by_frame(x: Tensor, timesteps: Tensor) -> Tensor:
    """A network that sees each frame, and its timestep, by itself."""
    rows = timesteps if timesteps.ndim > 1 else timesteps[:, None]
    return torch.tanh(x) * (0.5 + rows[:, :, None, None, None] / 100)


@pytest.mark.parametrize("span", [1, 2])
@pytest.mark.parametrize("frames", ["prefix", "random"])
def test_draws_against_brute_force(frames: str, span: int) -> None:
    config = ConditionConfig(frames=frames, probability=0.7, max_frames=4)
    uniform = torch.rand(500, config.num_uniforms(8, span), generator=torch.Generator().manual_seed(0))
    drawn = config.draw(uniform, span)
    assert drawn.shape == (500, 8)
    for row, mask in zip(uniform.tolist(), drawn.tolist(), strict=True):
        some, share, half, *own = row
        count = 0 if some >= 0.7 else 1 + int(share * (4 // span))
        mixed = frames == "random" and half < 0.5
        units = set(sorted(range(len(own)), key=own.__getitem__ if mixed else None)[:count])
        assert mask == [place // span in units for place in range(8)]


def test_configurations_without_sense_are_refused() -> None:
    for keys, sentence in (
        ({"frames": "last"}, "condition.frames"),
        ({"frames": "prefix", "probability": 0.0}, "condition.probability"),
        ({"frames": "prefix", "max_frames": 0}, "condition.max_frames"),
        ({"probability": 0.9}, "read only with condition.frames"),
        ({"max_frames": 3}, "read only with condition.frames"),
    ):
        refuses(sentence, ConditionConfig, **keys)
    refuses("no frame to predict", lambda: ConditionConfig(frames="prefix", max_frames=16).check_clip(16, 1))
    with pytest.raises(ValueError, match=r"multiple of model\.tubelet_size=2"):
        ConditionConfig(frames="prefix", max_frames=3).check_clip(16, 2)


@pytest.mark.parametrize(
    ("frames", "places", "span", "sentence"),
    [
        ("none", [0], 1, "trained without given frames"),
        ("prefix", [1], 1, "not frames 1"),
        ("prefix", [0, 1, 2], 1, "3 given frames are more than the 2"),
        ("random", [8], 1, "nothing to sample"),
        ("random", [1, 2], 2, "complete tubelets"),
    ],
)
def test_unsuitable_given_frames_are_refused(frames: str, places: list[int], span: int, sentence: str) -> None:
    config = ConditionConfig() if frames == "none" else ConditionConfig(frames=frames, max_frames=2)
    config.check_given([], 8, span)
    refuses(sentence, config.check_given, places, 8, span)


@pytest.mark.parametrize("images", [0, 2])
@pytest.mark.parametrize(("prediction", "learn_sigma"), [("epsilon", True), ("velocity", False), ("flow", False)])
def test_the_loss_is_over_the_other_frames_only(prediction: str, learn_sigma: bool, images: int) -> None:
    diffusion = process(prediction, learn_sigma=learn_sigma)
    clips, noise = randn(*SHAPE), randn(*SHAPE, seed=1)
    length = SHAPE[1] - images
    mask = torch.tensor([[True, True, False, False], [False, True, False, True], [False] * 4])
    mask = torch.cat([mask, torch.zeros(3, length - 4, dtype=torch.bool)], dim=1)
    padded = torch.cat([mask, torch.zeros(3, images, dtype=torch.bool)], dim=1)
    timesteps = torch.tensor([3, 20, 49])
    output = randn(3, 6, 4 if learn_sigma else 2, 4, 4, seed=2)
    seen: dict[str, Tensor] = {}

    def network(x: Tensor, t: Tensor) -> Tensor:
        seen.update(x=x, t=t)
        return output

    every = diffusion.training_losses(lambda x, t: output, clips, timesteps, noise)
    conditioned = condition_denoiser(network, Given(clips, padded))
    terms = diffusion.training_losses(conditioned, clips, timesteps, noise).without(mask)
    for clip in range(3):
        learned = [frame for frame in range(length) if not mask[clip, frame]]
        of_clip = sum(float(every.per_frame()[clip, frame]) for frame in learned) / len(learned)
        of_images = sum(float(every.per_frame()[clip, frame]) for frame in range(length, 6))
        assert float(terms.loss[clip]) == pytest.approx((of_clip * length + of_images) / 6, rel=1e-12)
        for frame in range(6):
            noisy = diffusion.q_sample(clips[clip : clip + 1], timesteps[clip : clip + 1], noise[clip : clip + 1])
            expected = clips[clip, frame] if padded[clip, frame] else noisy[0, frame]
            assert torch.equal(seen["x"][clip, frame], expected)
            assert seen["t"][clip, frame] == (0 if padded[clip, frame] else timesteps[clip])


@pytest.mark.parametrize("method", METHODS)
def test_known_frames_are_returned_exactly_and_others_are_sampled_as_usual(method: str) -> None:
    diffusion, given, noise = process(METHODS[method], "7"), known([[0], [0, 5], [2, 3]]), randn(*SHAPE)
    seen: list[tuple[Tensor, Tensor]] = []

    def network(x: Tensor, timesteps: Tensor) -> Tensor:
        seen.append((x, timesteps))
        return frame_by_frame(x, timesteps)

    def draws() -> dict[str, object]:
        generator = torch.Generator().manual_seed(3)
        return {"noise_fn": lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype)}

    out = sample_given(diffusion, network, noise, given, method=method, **draws())
    plain = sample(diffusion, frame_by_frame, noise, method=method, **draws())
    assert torch.equal(sample_given(diffusion, frame_by_frame, noise, None, method=method, **draws()), plain)
    assert torch.equal(out[given.frames], given.latents[given.frames])
    torch.testing.assert_close(out[~given.frames], plain[~given.frames], rtol=1e-9, atol=1e-9)
    for x, timesteps in seen:
        assert torch.equal(x[given.frames], given.latents[given.frames])
        assert (not timesteps[given.frames].any() and timesteps[~given.frames].all()) or timesteps.max() == 0


@pytest.mark.parametrize("method", ["autoregressive", "fused"])
def test_windows_cover_every_frame_and_overlap_enough(method: str) -> None:
    for total in range(1, 40):
        for window in range(2, 9):
            for overlap in range(1, window):
                starts = window_starts(total, window, overlap, method)
                covered = {place for start in starts for place in range(start, start + window)}
                assert set(range(total)) <= covered
                assert all(after - before <= window - overlap for before, after in pairwise(starts))
                if method == "fused" and total >= window:
                    assert max(covered) == total - 1
                if len(starts) > 1:  # none is needless
                    assert starts[-2] + window < total


def test_seams_are_where_windows_begin_or_end() -> None:
    assert find_seams(16, 16, 4, "fused") == find_seams(16, 16, 4, "autoregressive") == []
    assert find_seams(32, 16, 4, "autoregressive") == [16, 28]
    assert find_seams(32, 16, 4, "fused") == [12, 16, 28]


def test_fused_is_the_weighted_mean_of_the_windows() -> None:
    x, timesteps = randn(2, 11, 2, 3, 3), torch.tensor([4, 40])

    def network(part: Tensor, t: Tensor) -> Tensor:  # mixes the frames of a window
        return part.cumsum(1) * (t[:, None] if t.ndim == 1 else t)[..., None, None, None]

    for times in (timesteps, timesteps[:, None] + torch.arange(11)):
        found = fuse_windows(network, 5, 2)(x, times)
        total, weight = torch.zeros_like(x), torch.zeros(11, dtype=torch.float64)
        for start in (0, 3, 6):
            part = network(x[:, start : start + 5], times if times.ndim == 1 else times[:, start : start + 5])
            for place, share in enumerate((1, 2, 3, 2, 1)):
                total[:, start + place] += share * part[:, place]
                weight[start + place] += share
        torch.testing.assert_close(found, total / weight[:, None, None, None], rtol=1e-12, atol=1e-12)
    assert torch.equal(fuse_windows(network, 11, 5)(x, timesteps), network(x, timesteps))  # one window over all
    assert ramp(8, 2, x).tolist() == [1, 2, 3, 3, 3, 3, 2, 1]


@pytest.mark.parametrize("overlap", [1, 3])
def test_sliding_windows_continue_from_known_frames(overlap: int) -> None:
    steps: list[list[bool]] = []

    def count_on(latents: Tensor, places: list[bool]) -> Tensor:
        steps.append(places)
        first = places.index(True)
        return latents[:, [first]] + torch.arange(len(places)).view(1, -1, 1, 1, 1) - first

    start = torch.zeros(2, 14, 1, 1, 1, dtype=torch.float64)
    start[:, 1] = 7.0
    clips = slide_windows(count_on, start, [place == 1 for place in range(14)], 5, overlap)
    assert clips.flatten(1).tolist() == [[6.0 + place for place in range(14)]] * 2
    assert steps[0] == [False, True, False, False, False]
    assert steps[1:] == [[place < overlap for place in range(5)]] * (len(steps) - 1)
    assert len(steps) == len(window_starts(14, 5, overlap, "autoregressive"))
