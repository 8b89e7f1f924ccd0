"""Every option of the network against a second implementation, from the definitions, with loops.

The reference below shares no code with `models/`: it takes a state dict, walks over samples, groups of tokens and
heads in Python, and is compared in float64, output and all gradients.
"""

import math
from dataclasses import dataclass, replace
from itertools import cycle, product
from typing import Any

import pytest
import torch
from torch import Tensor

from models import Latte, LatteConfig, Route

WIDTH, HEADS, DEPTH, PATCH, CHANNELS, CLASSES = 16, 4, 2, 2, 2, 3
BATCH, FRAMES, HEIGHT, LATENT_WIDTH = 2, 4, 4, 6

# per layer: attention over space "s" and time "t"; "+" adds the two in one branch, ">" is one after the other
LAYERS = {
    "interleaved": ["s", "t"],
    "late_fusion": ["s", "t"],
    "sequential": ["s>t", "s>t"],
    "parallel": ["s+t", "s+t"],
}


@dataclass(frozen=True)
class Case:
    variant: str
    patch_embedding: str = "uniform"
    injection: str = "adaln"
    temporal_position: str = "absolute"
    num_classes: int = CLASSES
    images: int = 0
    depth: int = DEPTH

    def __str__(self) -> str:
        return "-".join(str(value) for value in self.__dict__.values())


CASES = [
    *(Case(variant, images=images) for variant in LAYERS for images in (0, 2)),
    Case("late_fusion", depth=4, num_classes=0),
    Case("interleaved", "tubelet"),
    Case("interleaved", "tubelet", images=2),
    Case("sequential", "tubelet", num_classes=0, images=1),
    Case("interleaved", injection="tokens", num_classes=0),
    Case("sequential", injection="tokens"),
    Case("parallel", injection="tokens", images=2),
    Case("late_fusion", temporal_position="rope"),
    Case("sequential", temporal_position="rope", images=1),
    Case("parallel", temporal_position="rope", num_classes=0),
    Case("interleaved", "tubelet", "tokens", "rope", images=2),
    Case("parallel", "tubelet", "tokens", "rope", images=1),
]


@pytest.mark.parametrize("times", ["clip", "frame"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_gradients_equal_the_loops(case: Case, times: str) -> None:
    """With a timestep for each clip, or one for each frame."""
    x, timesteps, labels = inputs(case)
    if times == "frame":
        span = 2 if case.patch_embedding == "tubelet" else 1
        own = torch.tensor([[0.0, 3.5, 400.0, 999.0], [7.0, 0.0, 0.0, 250.0]], dtype=torch.float64)
        timesteps = torch.cat([own[:, ::span].repeat_interleave(span, 1), own[:, 1 : 1 + case.images]], 1)
    compare(random_model(case), case, (x, timesteps, labels))


EACH, SHARED = torch.tensor([[4, 0, 3], [1, 5, 2]]), torch.tensor([2, 0, 5, 1, 4, 3])  # positions that a route keeps


ROUTES = [Route(0, 4, EACH), Route(1, 3, EACH), Route(3, 4, EACH), Route(0, 4, SHARED)]


@pytest.mark.parametrize(("case", "route"), zip([case for case in CASES if case.images], cycle(ROUTES)), ids=str)
def test_routes_and_hidden_states_equal_the_loops(case: Case, route: Route) -> None:
    """In training, with gradient checkpointing."""
    case, runs = replace(case, depth=4), []
    model = random_model(case, checkpointing=True).train()
    model.blocks[0].register_forward_pre_hook(lambda *_: runs.append(1))
    compare(model, case, inputs(case), route=route)
    assert len(runs) == 3  # two outputs, and again for the gradient of one


@pytest.mark.parametrize("stretch", [False, True], ids=["count-on", "stretch"])
@pytest.mark.parametrize("position", ["absolute", "rope"])
def test_other_sizes_and_frame_counts_equal_the_loops(position: str, stretch: bool) -> None:
    case = Case("sequential", temporal_position=position)
    model = random_model(case, stretch=stretch)
    compare(model, case, inputs(case, frames=6, height=6, width=4), stretch=stretch)


def compare(model: Latte, case: Case, batch: tuple, *, stretch: bool = False, route: Route | None = None) -> None:
    x, timesteps, labels = batch
    x.requires_grad_()
    state = dict(model.state_dict(keep_vars=True))
    leaves = [x, *model.parameters()]
    given: dict[str, Any] = {"num_images": case.images, "route": route}
    out, states = model(x, timesteps, labels, **given, return_hidden_states=range(case.depth))
    assert torch.equal(out, model(x, timesteps, labels, **given))
    ours, theirs = [out, *states.values()], Reference(state, case, stretch, route).run(x, timesteps, labels)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    weights = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(5))
    our_gradients, their_gradients = (
        torch.autograd.grad((result * weights).sum() + sum(each.square().sum() for each in hidden), leaves)
        for result, *hidden in (ours, theirs)
    )
    names = ["x", *(name for name, _ in model.named_parameters())]
    for name, first, second in zip(names, our_gradients, their_gradients):
        scale = max(1.0, second.abs().max().item())
        assert (first - second).abs().max() <= 1e-10 * scale, name


def random_model(case: Case, *, stretch: bool = False, checkpointing: bool = False) -> Latte:
    names = ("variant", "patch_embedding", "injection", "temporal_position", "num_classes", "depth")
    options = {"hidden_size": WIDTH, "num_heads": HEADS, "patch_size": PATCH}
    options |= {"position_interpolation": stretch, "gradient_checkpointing": checkpointing}
    config = LatteConfig(name="custom", **options, **{name: getattr(case, name) for name in names})
    size = (HEIGHT, LATENT_WIDTH)
    model = Latte(config, in_channels=CHANNELS, latent_size=size, num_frames=FRAMES).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, dtype=torch.float64, generator=generator))
    return model


def inputs(case: Case, frames: int = FRAMES, height: int = HEIGHT, width: int = LATENT_WIDTH) -> tuple:
    generator = torch.Generator().manual_seed(1)
    shape = (BATCH, frames + case.images, CHANNELS, height, width)
    x = torch.randn(shape, dtype=torch.float64, generator=generator)
    timesteps = torch.tensor([3.0, 871.5], dtype=torch.float64)
    shape = (BATCH, 1 + case.images)
    labels = torch.randint(0, case.num_classes + 1, shape, generator=generator) if case.num_classes else None
    return x, timesteps, labels


class Reference:
    """The network from weights alone, a sample at a time. Frames are those of the clip, or tubelets, and images."""

    def __init__(self, state: dict[str, Tensor], case: Case, stretch: bool, route: Route | None) -> None:
        self.state, self.case, self.stretch, self.route = state, case, stretch, route
        self.span = 2 if case.patch_embedding == "tubelet" else 1
        half = case.depth // 2
        alternating, stacked = LAYERS["interleaved"] * half, ["s"] * half + ["t"] * half
        joint = {name: LAYERS[name][:1] * case.depth for name in ("sequential", "parallel")}
        self.layers = {"interleaved": alternating, "late_fusion": stacked, **joint}[case.variant]

    def run(self, x: Tensor, timesteps: Tensor, labels: Tensor | None) -> list[Tensor]:
        """The output, and the tokens after each block: within the route, those that it keeps."""
        times = timesteps.reshape(len(x), -1).expand(x.shape[:2]).tolist()
        given = [None] * len(x) if labels is None else labels
        keep = [None] * len(x) if self.route is None else self.route.keep.expand(len(x), -1)
        return [torch.stack(each) for each in zip(*map(self.run_one, x, times, given, keep))]

    def run_one(self, x: Tensor, times: list[float], labels: Tensor | None, keep: Tensor | None) -> list[Tensor]:
        self.clip = (len(x) - self.case.images) // self.span
        self.rows, self.columns = x.shape[2] // PATCH, x.shape[3] // PATCH
        self.places = list(product(range(self.rows), range(self.columns)))
        tokens = self.embed(x)  # (F, N, D)
        end = self.clip * self.span
        vectors = [[self.timestep(time)] for time in [*times[: end : self.span], *times[end:]]]
        for frame in range(len(tokens) if labels is not None else 0):
            label = labels[max(0, 1 + frame - self.clip)]
            vectors[frame].append(self.state["y_embedder.embedding_table.weight"][label])
        self.conditions = torch.stack([torch.stack(each).sum(0) for each in vectors])
        if self.case.injection == "tokens":
            tokens = torch.cat([tokens, torch.stack([torch.stack(each) for each in vectors])], 1)
        first = next(index for index, layer in enumerate(self.layers) if "t" in layer)
        everything, hidden = torch.arange(len(self.places)), []
        for index, layer in enumerate(self.layers):
            tokens = self.add_time(tokens) if index == first else tokens.clone()
            routed = self.route is not None and self.route.start <= index < self.route.stop
            kept = keep if routed else everything
            rows = torch.cat([kept, torch.arange(len(everything), tokens.shape[1])])  # with the appended ones
            tokens[:, rows] = self.layer(f"blocks.{index}", layer, tokens[:, rows])
            hidden.append(tokens[:, kept])
        return [self.decode(tokens), *hidden]

    def embed(self, x: Tensor) -> Tensor:
        weight, bias = self.state["x_embedder.proj.weight"], self.state["x_embedder.proj.bias"]
        weight = weight if weight.ndim == 5 else weight[:, :, None]  # (D, C, s, p, p)
        end = self.clip * self.span
        frames = [*x[:end].split(self.span), *(x[[image] * self.span] for image in range(end, len(x)))]

        def token(frame: Tensor, row: int, column: int) -> Tensor:
            patch = frame[:, :, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]
            return (weight * patch.transpose(0, 1)).sum((1, 2, 3, 4)) + bias + self.space(row, column)

        return torch.stack([torch.stack([token(frame, *place) for place in self.places]) for frame in frames])

    def space(self, row: int, column: int) -> Tensor:
        trained = HEIGHT // PATCH, LATENT_WIDTH // PATCH
        if self.stretch:
            row, column = row * trained[0] / self.rows, column * trained[1] / self.columns
        table = torch.tensor(sines(column, WIDTH // 2) + sines(row, WIDTH // 2), dtype=torch.float64)
        return table.float().double() if (self.rows, self.columns) == trained else table  # as stored

    def time_scale(self) -> float:
        return FRAMES / self.span / self.clip if self.stretch else 1.0

    def add_time(self, tokens: Tensor) -> Tensor:
        if self.case.temporal_position == "rope":
            assert "temp_embed" not in self.state
            return tokens
        rows = [sines(frame * self.time_scale(), WIDTH) for frame in range(self.clip)]
        table = torch.tensor(rows, dtype=torch.float64)
        table = table.float().double() if self.clip * self.span == FRAMES else table  # as stored
        return torch.cat([tokens[: self.clip] + table[:, None], tokens[self.clip :]])

    def timestep(self, time: float) -> Tensor:
        angles = [time * 10000 ** (-i / 128) for i in range(128)]
        features = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
        hidden = self.linear("t_embedder.mlp.0", torch.tensor(features, dtype=torch.float64))
        return self.linear("t_embedder.mlp.2", hidden / (1 + torch.exp(-hidden)))

    def modulation(self, name: str, count: int) -> Tensor:
        """(count, F, 1, D) from the condition of each frame; the neutral ones without adaLN."""
        if self.case.injection == "tokens":
            return torch.tensor([0.0, 0.0, 1.0] * (count // 3 or 1)).view(-1, 1, 1, 1)
        hidden = self.conditions / (1 + torch.exp(-self.conditions))
        return self.linear(f"{name}.adaLN_modulation.1", hidden).unflatten(1, (count, 1, WIDTH)).transpose(0, 1)

    def layer(self, name: str, layer: str, tokens: Tensor) -> Tensor:
        end = self.clip if layer == "t" else len(tokens)
        tokens, passing = tokens[:end], tokens[end:]
        modulation = self.modulation(name, 6)[:, :end]
        for branch in layer.split(">"):
            kinds = branch.split("+")
            entered = self.norm(f"{name}.norm1", tokens) * (1 + modulation[1]) + modulation[0]
            outputs = [self.attend(name, layer, kind, entered, HEADS // len(kinds)) for kind in kinds]
            tokens = tokens + modulation[2] * sum(outputs)
        entered = self.norm(f"{name}.norm2", tokens) * (1 + modulation[4]) + modulation[3]
        hidden = self.linear(f"{name}.mlp.fc1", entered)
        inner = math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)
        tokens = tokens + modulation[5] * self.linear(f"{name}.mlp.fc2", 0.5 * hidden * (1 + torch.tanh(inner)))
        return torch.cat([tokens, passing])

    def attend(self, name: str, layer: str, kind: str, tokens: Tensor, heads: int) -> Tensor:
        """Attention within groups of tokens: those of a frame, or those of a place in the clip."""
        name = f"{name}.temporal_attn" if kind == "t" and layer != "t" else f"{name}.attn"
        if kind == "s":
            return torch.stack([self.group(name, frame, heads, False) for frame in tokens])
        turn = self.case.temporal_position == "rope"
        over_time = [self.group(name, place, heads, turn) for place in tokens[: self.clip].unbind(1)]
        return torch.cat([torch.stack(over_time, 1), torch.zeros_like(tokens[self.clip :])])

    def group(self, name: str, tokens: Tensor, heads: int, turn: bool) -> Tensor:
        size = WIDTH // heads
        queries, keys, values = self.linear(f"{name}.qkv", tokens).unflatten(1, (3, heads, size)).unbind(1)
        if turn:
            queries, keys = (torch.stack([self.turn(*each) for each in enumerate(part)]) for part in (queries, keys))
        outputs = []
        for head in range(heads):
            scores = torch.exp(queries[:, head] @ keys[:, head].T / math.sqrt(size))
            outputs.append(scores @ values[:, head] / scores.sum(1, keepdim=True))
        return self.linear(f"{name}.proj", torch.cat(outputs, 1))

    def turn(self, frame: int, vectors: Tensor) -> Tensor:
        half = vectors.shape[-1] // 2
        turned = list(vectors.unbind(-1))
        for i in range(half):
            angle = frame * self.time_scale() * 10000 ** (-i / half)
            a, b = vectors[..., i], vectors[..., i + half]
            turned[i] = a * math.cos(angle) - b * math.sin(angle)
            turned[i + half] = b * math.cos(angle) + a * math.sin(angle)
        return torch.stack(turned, -1)

    def decode(self, tokens: Tensor) -> Tensor:
        shift, scale = self.modulation("final_layer", 2)[:2]
        entered = self.norm("final_layer.norm_final", tokens) * (1 + scale) + shift
        values, pixels = self.linear("final_layer.linear", entered), {}
        for token, (row, column) in enumerate(self.places):
            for part, (down, right) in enumerate(product(range(PATCH), repeat=2)):
                found = values[:, token, part * 2 * CHANNELS : (part + 1) * 2 * CHANNELS]
                pixels[row * PATCH + down, column * PATCH + right] = found  # (F, 2C)
        video = torch.stack([pixels[place] for place in sorted(pixels)], -1)
        video = video.unflatten(-1, (self.rows * PATCH, self.columns * PATCH))
        if self.span == 1:
            return video
        weight, bias = self.state["frame_upsampler.proj.weight"], self.state["frame_upsampler.proj.bias"]
        steps = [torch.einsum("fihw,io->fohw", video, weight[:, :, step, 0, 0]) for step in range(self.span)]
        spread = torch.stack(steps, 1) + bias[:, None, None]  # (F, s, 2C, H, W)
        return torch.cat([spread[: self.clip].flatten(0, 1), spread[self.clip :].mean(1)])

    def linear(self, name: str, vectors: Tensor) -> Tensor:
        return vectors @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def norm(self, name: str, vectors: Tensor) -> Tensor:
        centred = vectors - vectors.mean(-1, keepdim=True)
        normed = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-6)
        if self.case.injection == "tokens":
            return normed * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]
        assert f"{name}.weight" not in self.state
        return normed


def sines(position: float, dim: int) -> list[float]:
    angles = [position / 10000 ** (i / (dim // 2)) for i in range(dim // 2)]
    return [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
