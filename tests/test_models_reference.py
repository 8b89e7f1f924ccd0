"""Every option of the network against a second implementation: loops over tokens, from the definitions.

The reference below shares no code with `models/`: it takes a state dict, walks over samples, frames, tokens
and heads in Python, and is compared in float64, output and all gradients.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch
from torch import Tensor

from models import Latte, LatteConfig

WIDTH, HEADS, DEPTH, PATCH, CHANNELS, CLASSES = 16, 4, 2, 2, 2, 3
BATCH, FRAMES, HEIGHT, LATENT_WIDTH = 2, 4, 4, 6
Vectors = dict[tuple[int, int, int], Tensor]  # (sample, frame, token) -> (D,)

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


@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_gradients_equal_the_loops(case: Case) -> None:
    model = random_model(case)
    compare(model, case, inputs(case))


@pytest.mark.parametrize("stretch", [False, True], ids=["count-on", "stretch"])
@pytest.mark.parametrize("position", ["absolute", "rope"])
def test_other_sizes_and_frame_counts_equal_the_loops(position: str, stretch: bool) -> None:
    case = Case("sequential", temporal_position=position)
    model = random_model(case, stretch=stretch)
    compare(model, case, inputs(case, frames=6, height=6, width=4), stretch=stretch)


def compare(model: Latte, case: Case, batch: tuple, stretch: bool = False) -> None:
    x, timesteps, labels = batch
    x.requires_grad_()
    state = dict(model.state_dict(keep_vars=True))
    leaves = [x, *model.parameters()]
    ours = model(x, timesteps, labels, num_images=case.images)
    theirs = Reference(state, case, stretch).run(x, timesteps, labels)
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    weights = torch.randn(ours.shape, dtype=ours.dtype, generator=torch.Generator().manual_seed(5))
    our_gradients = torch.autograd.grad((ours * weights).sum(), leaves)
    their_gradients = torch.autograd.grad((theirs * weights).sum(), leaves)
    names = ["x", *(name for name, _ in model.named_parameters())]
    for name, first, second in zip(names, our_gradients, their_gradients):
        scale = max(1.0, second.abs().max().item())
        assert (first - second).abs().max() <= 1e-10 * scale, name


def random_model(case: Case, *, stretch: bool = False) -> Latte:
    """A small float64 network with all weights random, so that no branch is silent."""
    config = LatteConfig(
        name="custom",
        hidden_size=WIDTH,
        depth=case.depth,
        num_heads=HEADS,
        patch_size=PATCH,
        variant=case.variant,
        patch_embedding=case.patch_embedding,
        injection=case.injection,
        temporal_position=case.temporal_position,
        position_interpolation=stretch,
        num_classes=case.num_classes,
    )
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
    """The network as loops, from weights alone."""

    def __init__(self, state: dict[str, Tensor], case: Case, stretch: bool) -> None:
        self.state, self.case, self.stretch = state, case, stretch
        self.span = 2 if case.patch_embedding == "tubelet" else 1
        half = case.depth // 2
        alternating, stacked = LAYERS["interleaved"] * half, ["s"] * half + ["t"] * half
        joint = {name: LAYERS[name][:1] * case.depth for name in ("sequential", "parallel")}
        self.layers = {"interleaved": alternating, "late_fusion": stacked, **joint}[case.variant]

    def run(self, x: Tensor, timesteps: Tensor, labels: Tensor | None) -> Tensor:
        self.batch, total = x.shape[:2]
        self.rows, self.columns = x.shape[3] // PATCH, x.shape[4] // PATCH
        self.clip = (total - self.case.images) // self.span  # frames, or tubelets
        self.total = self.clip + self.case.images
        tokens = self.embed(x)
        tokens = self.condition(tokens, timesteps, labels)
        timed = False
        for index, layer in enumerate(self.layers):
            if "t" in layer and not timed:
                tokens, timed = self.add_time(tokens), True
            tokens = self.layer(f"blocks.{index}", layer, tokens)
        return self.decode(tokens)

    # --- from latents to tokens

    def embed(self, x: Tensor) -> Vectors:
        weight, bias = self.state["x_embedder.proj.weight"], self.state["x_embedder.proj.bias"]
        weight = weight if weight.ndim == 5 else weight[:, :, None]  # (D, C, s, p, p)
        tokens: Vectors = {}
        for sample in range(self.batch):
            for frame in range(self.total):
                for row in range(self.rows):
                    for column in range(self.columns):
                        patch = self.patch(x[sample], frame, row, column)
                        vector = (weight * patch).sum((1, 2, 3, 4)) + bias
                        token = row * self.columns + column
                        tokens[sample, frame, token] = vector + self.space(row, column)
        return tokens

    def patch(self, frames: Tensor, frame: int, row: int, column: int) -> Tensor:
        """(C, s, p, p): s frames of the clip, or one image s times."""
        first = frame * self.span
        image = self.clip * self.span + frame - self.clip
        which = [first + step for step in range(self.span)] if frame < self.clip else [image] * self.span
        down, right = row * PATCH, column * PATCH
        return torch.stack([frames[i, :, down : down + PATCH, right : right + PATCH] for i in which], dim=1)

    def space(self, row: int, column: int) -> Tensor:
        trained = HEIGHT // PATCH, LATENT_WIDTH // PATCH
        if (self.rows, self.columns) == trained:
            return self.state["pos_embed"][0, row * self.columns + column]
        if self.stretch:
            row, column = row * trained[0] / self.rows, column * trained[1] / self.columns
        return torch.tensor(sines(column, WIDTH // 2) + sines(row, WIDTH // 2), dtype=torch.float64)

    def time_scale(self) -> float:
        return FRAMES / self.span / self.clip if self.stretch else 1.0

    def add_time(self, tokens: Vectors) -> Vectors:
        if self.case.temporal_position == "rope":
            assert "temp_embed" not in self.state
            return tokens
        table = self.state["temp_embed"][0]
        if len(table) != self.clip:
            rows = [sines(frame * self.time_scale(), WIDTH) for frame in range(self.clip)]
            table = torch.tensor(rows, dtype=torch.float64)
        return {key: value + table[key[1]] if key[1] < self.clip else value for key, value in tokens.items()}

    # --- timestep and label

    def condition(self, tokens: Vectors, timesteps: Tensor, labels: Tensor | None) -> Vectors:
        self.conditions = {}
        tokens = dict(tokens)
        for sample in range(self.batch):
            time = self.timestep(timesteps[sample].item())
            for frame in range(self.total):
                extra = [time]
                if labels is not None:
                    label = labels[sample, 0 if frame < self.clip else 1 + frame - self.clip]
                    extra.append(self.state["y_embedder.embedding_table.weight"][label])
                self.conditions[sample, frame] = extra[0] + extra[1] if len(extra) == 2 else extra[0]
                if self.case.injection == "tokens":
                    for offset, vector in enumerate(extra):
                        tokens[sample, frame, self.rows * self.columns + offset] = vector
        return tokens

    def timestep(self, time: float) -> Tensor:
        angles = [time * 10000 ** (-i / 128) for i in range(128)]
        features = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
        hidden = self.linear("t_embedder.mlp.0", torch.tensor(features, dtype=torch.float64))
        return self.linear("t_embedder.mlp.2", hidden / (1 + torch.exp(-hidden)))

    def modulation(self, name: str, key: tuple[int, int, int], count: int) -> list[Tensor]:
        """`count` vectors from the condition of the token's frame; the neutral ones without adaLN."""
        if self.case.injection == "tokens":
            return [torch.zeros(WIDTH), torch.zeros(WIDTH), torch.ones(WIDTH)] * (count // 3 or 1)
        hidden = self.conditions[key[:2]]
        values = self.linear(f"{name}.adaLN_modulation.1", hidden / (1 + torch.exp(-hidden)))
        return [values[i * WIDTH : (i + 1) * WIDTH] for i in range(count)]

    # --- layers

    def layer(self, name: str, layer: str, tokens: Vectors) -> Vectors:
        passing = {key: value for key, value in tokens.items() if layer == "t" and key[1] >= self.clip}
        tokens = {key: value for key, value in tokens.items() if key not in passing}
        modulation = {key: self.modulation(name, key, 6) for key in tokens}
        for branch in layer.split(">"):
            kinds = branch.split("+")
            entered = {
                key: self.norm(f"{name}.norm1", value) * (1 + modulation[key][1]) + modulation[key][0]
                for key, value in tokens.items()
            }
            outputs = [self.attend(name, layer, kind, entered, HEADS // len(kinds)) for kind in kinds]
            tokens = {
                key: value + modulation[key][2] * sum(output[key] for output in outputs if key in output)
                for key, value in tokens.items()
            }
        for key, value in tokens.items():
            shift, scale, gate = modulation[key][3:]
            hidden = self.linear(f"{name}.mlp.fc1", self.norm(f"{name}.norm2", value) * (1 + scale) + shift)
            inner = math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)
            tokens[key] = value + gate * self.linear(f"{name}.mlp.fc2", 0.5 * hidden * (1 + torch.tanh(inner)))
        return {**tokens, **passing}

    def attend(self, name: str, layer: str, kind: str, tokens: Vectors, heads: int) -> Vectors:
        """Attention within groups of tokens: those of a frame, or those of a place in the clip."""
        name = f"{name}.temporal_attn" if kind == "t" and layer != "t" else f"{name}.attn"
        groups: dict[tuple[int, int], list] = {}
        for sample, frame, token in sorted(tokens):
            if kind == "s":
                groups.setdefault((sample, frame), []).append((sample, frame, token))
            elif frame < self.clip:
                groups.setdefault((sample, token), []).append((sample, frame, token))
        turn = kind == "t" and self.case.temporal_position == "rope"
        return {key: value for keys in groups.values() for key, value in self.group(name, keys, tokens, heads, turn)}

    def group(self, name: str, keys: list, tokens: Vectors, heads: int, turn: bool) -> list:
        size = WIDTH // heads
        mixed = [self.linear(f"{name}.qkv", tokens[key]) for key in keys]
        outputs: list[list[Tensor]] = [[] for _ in keys]
        for head in range(heads):
            parts = [slice(part * WIDTH + head * size, part * WIDTH + (head + 1) * size) for part in range(3)]
            queries, keyed, values = ([vector[part] for vector in mixed] for part in parts)
            if turn:
                queries = [self.turn(vector, key[1]) for vector, key in zip(queries, keys)]
                keyed = [self.turn(vector, key[1]) for vector, key in zip(keyed, keys)]
            for output, query in zip(outputs, queries):
                scores = [torch.exp((query * other).sum() / math.sqrt(size)) for other in keyed]
                weighted = sum(score * value for score, value in zip(scores, values))
                output.append(weighted / sum(scores))
        return [(key, self.linear(f"{name}.proj", torch.cat(output))) for key, output in zip(keys, outputs)]

    def turn(self, vector: Tensor, frame: int) -> Tensor:
        half = len(vector) // 2
        turned = list(vector)
        for i in range(half):
            angle = frame * self.time_scale() * 10000 ** (-i / half)
            a, b = vector[i], vector[i + half]
            turned[i] = a * math.cos(angle) - b * math.sin(angle)
            turned[i + half] = b * math.cos(angle) + a * math.sin(angle)
        return torch.stack(turned)

    # --- from tokens to latents

    def decode(self, tokens: Vectors) -> Tensor:
        channels = 2 * CHANNELS
        size = (self.batch, self.total, channels, self.rows * PATCH, self.columns * PATCH)
        pieces: dict[tuple[int, ...], Tensor] = {}
        for (sample, frame, token), value in tokens.items():
            if token >= self.rows * self.columns:
                continue
            shift, scale = self.modulation("final_layer", (sample, frame, token), 2)[:2]
            values = self.linear("final_layer.linear", self.norm("final_layer.norm_final", value) * (1 + scale) + shift)
            row, column = divmod(token, self.columns)
            for down in range(PATCH):
                for right in range(PATCH):
                    start = (down * PATCH + right) * channels
                    place = (sample, frame, row * PATCH + down, column * PATCH + right)
                    pieces[place] = values[start : start + channels]
        order = product(*(range(size[axis]) for axis in (0, 1, 3, 4)))
        flat = torch.stack([pieces[place] for place in order])
        video = flat.reshape(size[0], size[1], size[3], size[4], channels).permute(0, 1, 4, 2, 3)
        return video if self.span == 1 else torch.stack([self.upsample(clip) for clip in video])

    def upsample(self, tubelets: Tensor) -> Tensor:
        weight, bias = self.state["frame_upsampler.proj.weight"], self.state["frame_upsampler.proj.bias"]
        frames = []
        for index, tubelet in enumerate(tubelets):  # (C, H, W)
            spread = []
            for step in range(self.span):
                spread.append(sum_channels(weight[:, :, step, 0, 0], tubelet) + bias[:, None, None])
            frames += spread if index < self.clip else [sum(spread) / self.span]
        return torch.stack(frames)

    # --- arithmetic

    def linear(self, name: str, vector: Tensor) -> Tensor:
        return self.state[f"{name}.weight"] @ vector + self.state[f"{name}.bias"]

    def norm(self, name: str, vector: Tensor) -> Tensor:
        centred = vector - vector.mean()
        normed = centred / torch.sqrt((centred**2).mean() + 1e-6)
        if self.case.injection == "tokens":
            return normed * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]
        assert f"{name}.weight" not in self.state
        return normed


def sum_channels(weight: Tensor, frame: Tensor) -> Tensor:
    """`(C_in, C_out)` and `(C_in, H, W)` -> `(C_out, H, W)`."""
    return torch.stack([sum(weight[i, o] * frame[i] for i in range(len(frame))) for o in range(weight.shape[1])])


def sines(position: float, dim: int) -> list[float]:
    angles = [position / 10000 ** (i / (dim // 2)) for i in range(dim // 2)]
    return [math.sin(a) for a in angles] + [math.cos(a) for a in angles]


def test_the_reference_itself_tells_variants_apart() -> None:
    """With the same weights, variants of equal keys differ: the comparison above is not blind to the plan."""
    case = Case("sequential")
    model = random_model(case)
    x, timesteps, labels = inputs(case)
    state = dict(model.state_dict())
    first = Reference(state, case, False).run(x, timesteps, labels)
    second = Reference(state, replace(case, variant="parallel"), False).run(x, timesteps, labels)
    assert (first - second).abs().max() > 1e-3
