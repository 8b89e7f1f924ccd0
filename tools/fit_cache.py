"""Fit a step cache: in which steps of a sampler a range of the network's layers need not run.

    python -m tools.fit_cache --ckpt assets/demo/latte --steps 50 --method ddim --compute 25 --out cache.json
    python sample/sample.py --ckpt assets/demo/latte --steps 50 --method ddim --cache cache.json

The flags are those of sample.py: a schedule is for one network and one way of sampling, and refused for any other. A
few videos are sampled; at each evaluation the layers run, and are then replaced by what they added to the tokens at
each of the last --longest_reuse evaluations. What that does to the predicted clean clip, times the part of the noise
that the step takes away, is its cost; of all schedules with --compute full evaluations, dynamic programming finds the
one of the least sum. At the end the same videos are sampled by it, and compared.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from engine.cli import run

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from engine.config import Config
    from sample.generate import Generator
    from sample.step_cache import CacheSchedule

Costs = list[dict[int, float]]  # of evaluation j: i -> what it costs to reuse the layers of evaluation i < j


def main(argv: list[str]) -> int:
    """Fit as the command line says, and write the schedule."""
    from sample.sample import build_parser, load_generator, resolve

    parser = build_parser(__doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FILE", help="the schedule, JSON")
    add("--compute", type=int, required=True, metavar="N", help="evaluations that run all layers; the rest reuse")
    add("--layers", default=None, metavar="FIRST:END", help="the layers left out in the others; by default all")
    add("--longest_reuse", type=int, default=10, metavar="N", help="evaluations for which a reuse may last (10)")
    arguments = vars(parser.parse_intermixed_args(argv))
    out, compute, layers, window = (arguments.pop(key, None) for key in ("out", "compute", "layers", "longest_reuse"))
    if window < 1:
        raise ValueError(f"--longest_reuse must be at least 1, not {window}.")
    arguments["cache"] = None
    request = resolve(arguments)
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {out.parent}.")
    generator = load_generator(request, request.device)
    span = layer_range(layers, len(generator.model.blocks))
    schedule = fit(generator, request.config, compute, span, window)
    schedule.save(out)
    print(summary(schedule, compare(generator, request.config, schedule)))
    print(f"{out}: use it with --cache {out} and the same settings")
    return 0


def layer_range(text: str | None, depth: int) -> tuple[int, int]:
    """`FIRST:END` of `depth` layers, or all of them. Raises: ValueError."""
    if text is None:
        return 0, depth
    first, _, end = text.partition(":")
    if not (first.isdecimal() and end.isdecimal() and 0 <= int(first) < int(end) <= depth):
        raise ValueError(f"--layers {text}: write FIRST:END, with 0 <= FIRST < END <= {depth}, the layers there are.")
    return int(first), int(end)


def fit(generator: Generator, config: Config, compute: int, span: tuple[int, int], window: int = 10) -> CacheSchedule:
    """The best schedule of `compute` full evaluations for sampling as `config.sample` says.

    Raises:
        ValueError: `compute` is less than the settings need, or more than there are evaluations.
    """
    return fit_many(generator, config, [compute], span, window)[0]


def fit_many(
    generator: Generator, config: Config, computes: Sequence[int], span: tuple[int, int], window: int = 10
) -> list[CacheSchedule]:
    """A schedule for each number of full evaluations, from one measurement."""
    from engine.checkpoint import content_sha256
    from sample.generate import sampler_settings
    from sample.step_cache import CacheSchedule

    asked = sampler_settings(config)
    if asked["given"] or asked["windows"]:
        raise ValueError(
            "a step cache is for videos sampled at once and from noise alone: leave out given frames and windows."
        )
    costs, settings = measure(generator, config, span, window)
    weights = content_sha256(generator.model)
    found = []
    for compute in computes:
        computed, error = best_schedule(costs, compute)
        found.append(CacheSchedule(tuple(computed), *span, weights, settings, error))
    return found


class Probe:
    """The network as `diffusion.guided` calls it; keeps what the layers of `span` added at the last evaluations.

    `reuse` says from which evaluation the layers are replaced; None runs and records them.
    """

    def __init__(self, generator: Generator, span: tuple[int, int], window: int) -> None:
        self.network = generator.network
        self.span = span
        self.window = window
        self.number = -1
        self.reuse: int | None = None
        self.changes: dict[int, dict[int, Tensor]] = {}  # evaluation -> by which labels

    def next(self) -> None:
        """Begin an evaluation."""
        self.number += 1
        self.reuse = None
        self.changes = {at: kept for at, kept in self.changes.items() if self.number - at <= self.window}
        self.changes[self.number] = {}

    def __call__(self, x: Tensor, timesteps: Tensor, labels: Tensor | None) -> Tensor:
        kind = id(labels)  # guidance holds its tensors, as in sample.network.Calls
        if self.reuse is None:
            output, self.changes[self.number][kind] = self.network.with_change(
                x, timesteps, labels, None, self.span, None
            )
            return output
        return self.network.with_change(x, timesteps, labels, None, self.span, self.changes[self.reuse][kind])[0]

    def reusable(self) -> list[int]:
        """Earlier evaluations that were guided as this one is."""
        here = self.changes[self.number].keys()
        return [at for at, kept in self.changes.items() if at != self.number and kept.keys() == here]


def measure(generator: Generator, config: Config, span: tuple[int, int], window: int) -> tuple[Costs, dict[str, Any]]:
    """The cost of every reuse within the window, on the plain way of `sample.num_videos` videos, and the settings."""
    from diffusion import evaluations
    from diffusion import sample as run_sampler
    from engine.build import build_process
    from sample.generate import Guidance, VideoNoise
    from sample.network import Walk

    wanted = config.sample
    shape = generator.latent_shape(config.data.num_frames, config.data.image_size)
    process = build_process(generator.config, respacing=str(wanted.steps)).to(generator.device)
    method = generator.resolve_method(wanted.method)
    plan = evaluations(process, method)
    guidance = Guidance(wanted.guidance_scale, wanted.guidance_interval, wanted.batched_guidance)
    label_of = generator.labels_for(wanted.labels, wanted.label_rule, wanted.seed)
    squares: list[dict[int, list[Tensor]]] = [{} for _ in plan]
    for start in range(0, wanted.num_videos, wanted.batch_size):
        indices = range(start, min(start + wanted.batch_size, wanted.num_videos))
        noise, probe = VideoNoise(wanted.seed, indices, generator.device), Probe(generator, span, window)
        walk = Walk([each.time for each in plan], generator.config.diffusion.num_steps)
        denoiser = generator.denoiser([label_of(index) for index in indices], guidance, walk, probe)

        def probed(x: Tensor, timesteps: Tensor, denoiser: Any = denoiser, probe: Probe = probe) -> Tensor:
            probe.next()
            output = denoiser(x, timesteps)
            for earlier in probe.reusable():
                probe.reuse = earlier
                squares[probe.number].setdefault(earlier, []).append(_square(denoiser(x, timesteps), output, x))
            return output

        start_noise = noise.draw(shape)
        run_sampler(process, walk.counted(probed), start_noise, method=method, eta=wanted.eta, noise_fn=noise.like)
    costs = [
        {at: each.share * each.clean_gain * math.sqrt(_mean(values)) for at, values in found.items()}
        for each, found in zip(plan, squares, strict=True)
    ]
    return costs, generator.cache_settings(shape, wanted.steps, method, wanted.eta, guidance)


def _square(output: Tensor, expected: Tensor, x: Tensor) -> Tensor:
    """The mean square difference of two predictions, each video of the batch on its own: (B,)."""
    channels = x.shape[2]
    return (output - expected)[:, :, :channels].square().flatten(1).mean(1)


def _mean(values: Sequence[torch.Tensor]) -> float:
    import torch

    return float(torch.cat(list(values)).mean())


def best_schedule(costs: Costs, compute: int) -> tuple[list[bool], float]:
    """The schedule with `compute` full evaluations whose reuses cost least, and its cost.

    Dynamic programming over the places of the full evaluations: each serves all until the next.

    Raises:
        ValueError: there is none.
    """
    total = len(costs)
    if not 1 <= compute <= total:
        raise ValueError(f"--compute {compute}: this way of sampling has {total} evaluations; give 1 to {total}.")
    # runs[i][n]: what it costs that evaluation i serves the n after it
    runs = [[0.0] for _ in range(total)]
    for i in range(total):
        for j in range(i + 1, total):
            if i not in costs[j]:
                break
            runs[i].append(runs[i][-1] + costs[j][i])
    best = [math.inf] * total + [0.0]  # cost of all from i on, with so many full ones of which i is the first
    choices: list[list[int]] = []
    for _ in range(compute):
        now, choice = [math.inf] * (total + 1), [0] * total
        for i in range(total):
            for length, cost in enumerate(runs[i]):
                following = i + length + 1
                if cost + best[following] < now[i]:
                    now[i], choice[i] = cost + best[following], following
        best = now
        choices.append(choice)
    if math.isinf(best[0]):
        raise ValueError(
            f"--compute {compute} is too few: a reuse lasts --longest_reuse evaluations at most, and where guidance "
            "comes or goes all layers run; give more, or a larger --longest_reuse."
        )
    computed, place = [False] * total, 0
    for choice in reversed(choices):
        computed[place] = True
        place = choice[place]
    return computed, best[0]


def compare(generator: Generator, config: Config, schedule: CacheSchedule) -> float:
    """Root mean square difference, in grey levels, of the videos with the schedule from those without."""
    import numpy as np

    from sample.generate import sampler_settings

    settings = sampler_settings(config) | {"num": config.sample.num_videos}
    plain = generator.sample(**settings | {"cache": None}).astype(np.float32)
    return float(np.sqrt(np.mean((generator.sample(**settings | {"cache": schedule}) - plain) ** 2)))


def summary(schedule: CacheSchedule, difference: float) -> str:
    """What was found, for people: the schedule as a row of marks."""
    marks = "".join("#" if each else "." for each in schedule.computed)
    rows = [f"  {marks[start : start + 64]}" for start in range(0, len(marks), 64)]
    span = f"layers {schedule.first_layer} to {schedule.end_layer - 1}"
    head = f"{sum(schedule.computed)} of {len(schedule.computed)} evaluations run {span} (#); from noise to data:"
    error = f"predicted error of the latents {schedule.predicted_error:.3g}"
    tail = f"{error}; the videos differ by {difference:.2f} grey levels (root mean square)"
    return "\n".join([head, *rows, tail])


if __name__ == "__main__":
    run(main)
