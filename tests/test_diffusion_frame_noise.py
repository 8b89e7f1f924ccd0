"""A noise level for each frame: draws against order statistics, sampling against ordinary sampling of each frame."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffusion import DiffusionConfig, Given, build_diffusion, sample, sample_given, sample_rolling, spread_uniforms
from diffusion.frame_noise import sample_frames
from diffusion.windows import slide_windows

SHAPE = (2, 11, 2, 3, 3)  # B F C H W
STEPS = 7
METHODS = {"ddpm": "epsilon", "ddim": "x_start", "euler": "flow"}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def process(method: str):  # type: ignore[no-untyped-def]
    config = DiffusionConfig(num_steps=50, prediction=METHODS[method])
    return build_diffusion(config, learn_sigma=False, respacing=str(STEPS))


def frame_by_frame(x: Tensor, timesteps: Tensor) -> Tensor:
    """A network that sees each frame, and its timestep, by itself."""
    rows = timesteps if timesteps.ndim > 1 else timesteps[:, None]
    return torch.tanh(x) * (0.5 + rows[:, :, None, None, None] / 100)


def mixing(x: Tensor, timesteps: Tensor) -> Tensor:
    return frame_by_frame(x, timesteps) + 0.3 * x.mean(1, keepdim=True)


@pytest.mark.parametrize("span", [1, 2])
def test_draws_are_independent_or_order_statistics(span: int) -> None:
    """The i-th smallest of n uniform numbers has mean i / (n + 1) and variance i (n + 1 - i) / (n + 1)^2 / (n + 2)."""
    uniform = torch.rand(40_000, 4 + 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    independent, monotone = (spread_uniforms(uniform, kind, 2, span) for kind in ("independent", "monotone"))
    for found in (independent, monotone):
        assert torch.equal(found[:, -2:], uniform[:, 4:])  # the images
        assert torch.equal(found[:, :-2], found[:, :-2:span].repeat_interleave(span, 1))
        every = found[:, :-2].flatten().sort().values  # the marginal is uniform for both
        assert (every - torch.linspace(0, 1, len(every))).abs().max() < 0.01
    assert torch.equal(independent[:, :-2:span], uniform[:, :4])
    clip, rank = monotone[:, :-2:span], torch.arange(1, 5).double()
    assert (clip.diff(dim=1) >= 0).all()
    torch.testing.assert_close(clip.mean(0), rank / 5, atol=5e-3, rtol=0)
    torch.testing.assert_close(clip.var(0), rank * (5 - rank) / 25 / 6, atol=1e-3, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_equal_columns_are_ordinary_sampling(method: str) -> None:
    levels = torch.arange(STEPS, -1, -1)[:, None].expand(-1, SHAPE[1])
    seeds = [iter(range(1, 99)) for _ in range(2)]
    draws = [lambda x, seed=seed: randn(*x.shape, seed=next(seed)) for seed in seeds]  # type: ignore[misc]
    found = sample_frames(process(method), mixing, randn(*SHAPE), levels, method=method, noise_fn=draws[0])
    plain = sample(process(method), mixing, randn(*SHAPE), method=method, noise_fn=draws[1])
    torch.testing.assert_close(found, plain, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", ["ddim", "euler"])
def test_a_block_after_the_other_is_autoregressive_sampling(method: str) -> None:
    window, overlap, noise, starts = 5, 2, randn(*SHAPE), iter([0, 3, 6])

    def sample_window(latents: Tensor, places: list[bool]) -> Tensor:
        start = next(starts)
        given = Given(latents, torch.tensor([places])) if any(places) else None
        return sample_given(process(method), mixing, noise[:, start : start + window], given, method=method)

    expected = slide_windows(sample_window, torch.zeros(SHAPE).double(), [False] * SHAPE[1], window, overlap)
    blocks = torch.tensor([0] * 5 + [1] * 3 + [2] * 3)
    levels = (STEPS * (blocks + 1) - torch.arange(3 * STEPS + 1)[:, None]).clamp(0, STEPS)
    found = sample_frames(process(method), mixing, noise, levels, window=window, method=method)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("frames", "window", "overlap", "given", "span"),
    [(11, 4, 1, 0, 1), (11, 4, 3, 2, 1), (10, 6, 2, 4, 2), (10, 8, 2, 0, 2), (3, 8, 2, 1, 1), (11, 11, 1, 0, 1)],
)
def test_rolling_takes_each_frame_through_all_steps(
    frames: int, window: int, overlap: int, given: int, span: int
) -> None:
    """Frames that do not see each other end where ordinary sampling ends; noise rises along every window."""
    noise, known = randn(*SHAPE)[:, :frames], randn(*SHAPE, seed=1)[:, :frames]
    seen: list[Tensor] = []
    network = lambda x, timesteps: (seen.append(timesteps), frame_by_frame(x, timesteps))[1]  # noqa: E731
    places = Given(known, torch.arange(frames)[None] < given) if given else None
    found = sample_rolling(process("ddim"), network, noise, places, window=window, overlap=overlap, span=span)
    plain = sample(process("ddim"), frame_by_frame, noise, method="ddim")
    assert torch.equal(found[:, :given], known[:, :given])
    torch.testing.assert_close(found[:, given:], plain[:, given:], rtol=1e-10, atol=1e-10)
    assert max(len(timesteps[0].unique()) for timesteps in seen) > 1
    for timesteps in seen:
        assert timesteps.shape[1] == min(frames, window) and (timesteps.diff(dim=1) >= 0).all()
        assert torch.equal(timesteps, timesteps[:, ::span].repeat_interleave(span, 1))


@pytest.mark.parametrize(
    ("levels", "method", "sentence"),
    [
        ([[2, 2], [0, 2]], "ddim", "go down by one level"),
        ([[1, 2], [1, 2]], "ddim", "go down by one level"),
        ([[1, 2], [0, 1]], "unipc", "need method ddpm | ddim | euler, not unipc"),
    ],
)
def test_steps_that_no_frame_can_take_are_refused(levels: list[list[int]], method: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence.replace("|", r"\|")):
        sample_frames(process("ddim"), mixing, randn(2, 2, 2, 3, 3), torch.tensor(levels), method=method)
