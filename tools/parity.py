"""Comparisons with golden tensors of the official implementation.

For each golden file, one function yields the quantities to compare. The command is `tools.check_parity`.

Letters: B clips, F frames, I images, C channels, H W.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from datasets import transforms
from diffusion import DiffusionConfig, GaussianDiffusion, StepOptions, guide_denoiser, sample
from diffusion.samplers import ddim_reverse_step, ddim_step, ddpm_step
from engine.conditions import ClassLabels
from engine.optim import EMA
from evaluation.distances import frechet_distance
from models.convert import load_weights
from models.latte import Latte, LatteConfig

# defaults of the official constructors
OFFICIAL_DEFAULTS: dict[str, Any] = {
    "input_size": 32, "patch_size": 2, "in_channels": 4, "num_frames": 16, "use_image_num": 0,
    "hidden_size": 1152, "depth": 28, "num_heads": 16, "mlp_ratio": 4.0, "learn_sigma": True,
    "extras": 1, "num_classes": 1000, "class_dropout_prob": 0.1, "cfg_scale": 7.0,
    "lr": 1e-4, "clip_max_norm": 0.1, "ema_decay": 0.9999, "note": "",
}  # fmt: skip
# golden loss kind -> fields of DiffusionConfig, and whether sigma is learned
KINDS: dict[str, tuple[dict[str, str], bool]] = {
    "default": ({}, True),
    "kl": ({"loss": "rescaled_kl"}, True),
    "fixed_small": ({"fixed_variance": "small"}, False),
    "fixed_large": ({"fixed_variance": "large"}, False),
    "xstart": ({"prediction": "x_start"}, True),
    "rescaled": ({"loss": "rescaled_mse"}, True),
}
# golden name -> our field of PMeanVariance
P_PARTS = {"mean": "mean", "variance": "variance", "log_variance": "log_variance", "pred_xstart": "pred_x_start"}
POSTERIOR = ("mean_coef1", "mean_coef2", "variance", "log_variance_clipped")
TABLES = ("betas", "alphas_cumprod", *(f"posterior_{name}" for name in POSTERIOR))
SCHEDULES = {"linear": "linear", "squaredcos_cap_v2": "cosine"}  # official name -> ours
SINGLE_STEP_RESPACING = "10"
LOOP_SEED = 7
TRANSFORMS = ("resize_then_center_crop", "center_crop_then_resize")
Network = Callable[..., Tensor]


class Mismatch(Exception):
    """A quantity that cannot be compared; its message says why."""


class Setting(NamedTuple):
    """Folder of the goldens, device and precision."""

    folder: Path
    device: str
    precision: str


class Quantity(NamedTuple):
    """A quantity to compare.

    name: of its golden; a name that ends in `*` stands for all goldens with that prefix, compared key by key.
    compute: returns our value, for `*` a dict of values; raises Mismatch or ValueError if there is none.
    network: whether a network computes it (its bound is wider on CUDA and in bf16).
    """

    name: str
    compute: Callable[[], Tensor | dict[str, Tensor]]
    network: bool = False


class Goldens:
    """The tensors of one golden file by name, on `device`, and its configuration."""

    def __init__(self, path: Path, device: str) -> None:
        if not path.is_file():
            raise Mismatch("missing: there is no such file")
        try:
            with safe_open(path, "pt", device=device) as file:
                self.tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                config = json.loads((file.metadata() or {}).get("config", "{}"))
        except Exception as error:  # safetensors and json raise many types
            raise Mismatch(f"cannot be read: {error}") from error
        self.config: dict[str, Any] = OFFICIAL_DEFAULTS | config
        self.used: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise Mismatch(f"missing: the file has no tensor {name}")
        self.used.add(name)
        return self.tensors[name]

    def group(self, prefix: str) -> dict[str, Tensor]:
        """Returns all tensors under `prefix`, keyed by the rest of their names; Mismatch if there are none."""
        return {match[1]: self[match[0]] for match in self.matches(f"{re.escape(prefix)}(.*)")}

    def matches(self, pattern: str) -> list[re.Match[str]]:
        """Returns the full matches of `pattern` among the names; Mismatch if there are none."""
        found = [match for name in self.tensors if (match := re.fullmatch(pattern, name))]
        if not found:
            raise Mismatch(f"missing: the file has no tensor named {pattern}")
        return found


def empty_network(config: dict[str, Any]) -> Latte:
    """Returns the network of an official configuration, with its initial weights."""
    if config["extras"] not in (1, 2):
        raise Mismatch(f"extras={config['extras']} is neither unconditional (1) nor class-conditional (2)")
    ours = LatteConfig(
        name="custom",
        num_classes=config["num_classes"] if config["extras"] == 2 else 0,
        label_dropout=config["class_dropout_prob"],
        learn_sigma=config["learn_sigma"],
        **{key: config[key] for key in ("hidden_size", "depth", "num_heads", "patch_size", "mlp_ratio")},
    )
    size, sizes = config["input_size"], {key: config[key] for key in ("in_channels", "num_frames")}
    return Latte(ours, latent_size=size if isinstance(size, int) else (size[0], size[1]), **sizes)


def golden_network(golden: Goldens, setting: Setting) -> Latte:
    """Returns the network with the golden weights, loaded strictly."""
    model = empty_network(golden.config).to(setting.device).eval()
    load_weights(model, golden.group("state/"), "the golden state")
    return model


def in_precision(model: Latte, setting: Setting) -> Network:
    """Returns `model` as a function that computes in the setting's precision and returns fp32."""

    def call(*inputs: Any, **options: Any) -> Tensor:
        with torch.autocast(setting.device, torch.bfloat16, enabled=setting.precision == "bf16"):
            return model(*inputs, **options).float()

    return call


def check_network(golden: Goldens, setting: Setting, guided: bool = False) -> Iterator[Quantity]:
    """Yields position tables, a forward pass (with independent images, if any) and, if `guided`, a guided one."""

    def compute(run: Callable[[Goldens, Network], Tensor]) -> Tensor:
        with torch.no_grad():
            return run(golden, in_precision(golden_network(golden, setting), setting))

    def position_table(name: str) -> Tensor:
        return empty_network(golden.config).state_dict()[name].to(golden["x"].device)

    for name in ("pos_embed", "temp_embed"):
        yield Quantity(f"state/{name}", partial(position_table, name))
    yield Quantity("out", partial(compute, run_forward), network=True)
    if guided:
        yield Quantity("cfg_out", partial(compute, run_guided), network=True)


def run_forward(golden: Goldens, network: Network) -> Tensor:
    """Returns the output for the golden inputs."""
    labels, num_images = None, golden.config["use_image_num"]
    if golden.config["extras"] == 2:
        labels = golden["y"]
        if num_images:
            labels = torch.cat([labels[:, None], golden["y_image"]], dim=1)  # (B, 1+I)
    return network(golden["x"], golden["t"], labels, num_images=num_images)


def run_guided(golden: Goldens, network: Network) -> Tensor:
    """Returns the official guided output: the guided noise in both halves, and each half's own other channels."""
    channels, null_label = golden.config["in_channels"], golden.config["num_classes"]
    x, _ = golden["cfg_x"].chunk(2)  # the official code ignores the second half
    (timesteps, null_timesteps), (labels, null_labels) = golden["cfg_t"].chunk(2), golden["cfg_y"].chunk(2)
    if not (null_labels == null_label).all():
        raise Mismatch(f"the second half of cfg_y is not the null label {null_label}")
    condition = ClassLabels(labels, null_label)
    call = lambda x, t, condition: network(x, t, condition.values)  # noqa: E731
    conditional = guide_denoiser(call, condition, golden.config["cfg_scale"], channels=channels)(x, timesteps)
    rest = network(x, null_timesteps, null_labels)[:, :, channels:]
    return torch.cat([conditional, torch.cat([conditional[:, :, :channels], rest], dim=2)])


def process(golden: Goldens, respacing: str = "", learn_sigma: bool = True, **fields: Any) -> GaussianDiffusion:
    """Returns a diffusion process with as many steps as the golden tables."""
    x = golden["table/betas"]
    config = DiffusionConfig(num_steps=len(x), **fields)
    return GaussianDiffusion(config, learn_sigma=learn_sigma, respacing=respacing).to(x.device)


def check_diffusion(golden: Goldens, setting: Setting) -> Iterator[Quantity]:
    """Yields tables, schedules, respacing, noising, losses, posteriors, single steps and whole loops."""

    def table(name: str, **arguments: Any) -> Tensor:
        return process(golden, **arguments).tables[name]

    for name in TABLES:
        yield Quantity(f"table/{name}", partial(table, name))
    for official, schedule in SCHEDULES.items():
        yield Quantity(f"schedule/{official}", partial(table, "betas", schedule=schedule))
    for spec in dict.fromkeys(match[1] for match in golden.matches(r"respaced/(.+)/(?:timesteps|betas)")):
        yield Quantity(f"respaced/{spec}/timesteps", partial(lambda spec: process(golden, spec).timestep_map, spec))
        yield Quantity(f"respaced/{spec}/betas", partial(table, "betas", respacing=spec))
    yield Quantity("x_t", lambda: process(golden).q_sample(golden["x0"], golden["t"], golden["noise"]))
    for kind in KINDS:
        yield from check_kind(golden, kind)
    yield from check_single_steps(golden)
    yield from check_loops(golden, setting)


def check_kind(golden: Goldens, kind: str) -> Iterator[Quantity]:
    """Yields loss terms and posterior of one combination of prediction, variance and loss."""
    fields, learn_sigma = KINDS[kind]
    diffusion = process(golden, learn_sigma=learn_sigma, **fields)

    def output(*_: Any) -> Tensor:
        """Returns the fixed network output, without sigma where it is not learned."""
        return golden["model_output"][:, :, : None if learn_sigma else golden["x0"].shape[2]]

    def loss_term(term: str) -> Tensor:
        value: Tensor = getattr(diffusion.training_losses(output, golden["x0"], golden["t"], golden["noise"]), term)
        return value if term == "loss" else value.mean(1)  # the golden terms are also averaged over frames

    def posterior(part: str) -> Tensor:
        return getattr(diffusion.p_mean_variance(output(), golden["x_t"], golden["t"]), part)

    for term in ["loss"] + ["mse"] * (kind != "kl") + ["vb"] * (learn_sigma and kind != "kl"):
        yield Quantity(f"loss/{kind}/{term}", partial(loss_term, term))
    for golden_part, part in P_PARTS.items():
        yield Quantity(f"p/{kind}/{golden_part}", partial(posterior, part))


def check_single_steps(golden: Goldens) -> Iterator[Quantity]:
    """Yields one DDPM, DDIM (every eta) and reverse DDIM step with the fixed network output."""

    def step(function: Callable[..., Any], eta: float = 0.0) -> Tensor:
        options = StepOptions(eta=eta, noise_fn=lambda _: golden["step_noise"])
        diffusion, model = process(golden, SINGLE_STEP_RESPACING), lambda *_: golden["model_output"]
        return function(diffusion, model, golden["x_t"], golden["step_t"], options).x

    yield Quantity("ddpm/sample", partial(step, ddpm_step))
    # eta 0, then eta above 0: the file must have goldens of both
    for pattern in (r"ddim/eta(0+\.?0*)/sample", r"ddim/eta(0*\.?0*[1-9][\d.]*)/sample"):
        for match in golden.matches(pattern):
            yield Quantity(match[0], partial(step, ddim_step, float(match[1])))
    yield Quantity("ddim_reverse", partial(step, ddim_reverse_step))


def check_loops(golden: Goldens, setting: Setting) -> Iterator[Quantity]:
    """Yields whole sampling loops with the unconditional network of the same folder."""
    weights = cache(lambda: Goldens(setting.folder / "latte_uncond.safetensors", setting.device))
    network = cache(lambda: golden_network(weights(), setting))
    stated = re.search(r"manual_seed\((\d+)\) right before the loop", golden.config["note"])

    def loop(method: str, steps: str) -> Tensor:
        generator = torch.Generator().manual_seed(int(stated[1]) if stated else LOOP_SEED)
        return sample(
            process(golden, steps, learn_sigma=network().config.learn_sigma),
            in_precision(network(), setting),
            golden["loop/z"],
            method=method,
            noise_fn=lambda x: torch.randn(x.shape, generator=generator).to(x),
        )

    for method in ("ddpm", "ddim"):
        for match in golden.matches(rf"loop/{method}(\d+)"):
            yield Quantity(match[0], partial(loop, method, match[1]), network=True)


def check_transforms(golden: Goldens, setting: Setting) -> Iterator[Quantity]:
    """Yields every clip under both transforms."""
    names = "|".join(TRANSFORMS)
    sized = golden.matches(rf"(.+)/(?:{names})_(\d+)")

    def transform(clip: str, name: str, size: str) -> Tensor:
        return getattr(transforms, name)(golden[f"{clip}/clip"], int(size))

    for clip in dict.fromkeys(match[1] for match in golden.matches(rf"(.+)/(?:clip|(?:{names})_\d+)")):
        for size in sorted({match[2] for match in sized if match[1] == clip} or {sized[0][2]}):
            for name in TRANSFORMS:
                yield Quantity(f"{clip}/{name}_{size}", partial(transform, clip, name, size))


def check_frechet(golden: Goldens, setting: Setting) -> Iterator[Quantity]:
    """Yields the distance between two sets of features."""
    yield Quantity("distance", lambda: torch.tensor([frechet_distance(golden["real"], golden["fake"])]))


def check_trajectory(golden: Goldens, setting: Setting) -> Iterator[Quantity]:
    """Yields loss and gradient norm of every step; weights and EMA after the last."""
    trained = cache(lambda: train(golden, setting))
    for name in ("loss", "grad_norm", "final/*", "ema/*"):
        yield Quantity(name, partial(lambda name: trained()[name], name), network=True)


def train(golden: Goldens, setting: Setting) -> dict[str, Any]:
    """Runs the official loop's AdamW steps from the golden state on the golden batches."""
    config = golden.config
    model = golden_network(golden, setting).train()
    diffusion = GaussianDiffusion(DiffusionConfig(), learn_sigma=config["learn_sigma"]).to(setting.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config["lr"], weight_decay=0.0)
    ema = EMA(model, config["ema_decay"])
    losses, norms = [], []
    for x_start, noise, timesteps in zip(golden["x0"], golden["noise"], golden["t"]):
        loss = diffusion.training_losses(in_precision(model, setting), x_start, timesteps, noise).loss.mean()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), config["clip_max_norm"]))
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model)
        losses.append(loss.detach())
    weights = {"final/*": model.state_dict(), "ema/*": ema.state_dict()}
    return {"loss": torch.stack(losses), "grad_norm": torch.stack(norms), **weights}


def find_key_problem(name: str, official: dict[str, Any]) -> str:
    """Returns the first difference between our keys, shapes and parameter count and the official ones, or "".

    Args:
        name: such as "Latte-XL/2 extras=2".
        official: key -> shape, and `__params__`, the parameter count including the frozen position tables.
    """
    shapes = {key: tuple(shape) for key, shape in official.items() if key != "__params__"}
    classes = shapes["y_embedder.embedding_table.weight"][0] - 1 if "extras=2" in name else 0
    _, in_channels, patch_size, _ = shapes["x_embedder.proj.weight"]
    side, num_frames = math.isqrt(shapes["pos_embed"][1]) * patch_size, shapes["temp_embed"][1]
    with torch.device("meta"):
        config = LatteConfig(name=name.split()[0], num_classes=classes)
        model = Latte(config, in_channels=in_channels, latent_size=side, num_frames=num_frames)
    ours = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    differing = sorted(key for key in shapes.keys() | ours.keys() if shapes.get(key) != ours.get(key))
    if differing:
        return f"{len(differing)} keys differ, the first is {differing[0]}"
    count = sum(math.prod(shape) for shape in ours.values())
    return "" if count == official["__params__"] else f"{count} parameters, not {official['__params__']}"


CHECKS: dict[str, Callable[[Goldens, Setting], Iterator[Quantity]]] = {
    "latte_uncond": check_network,
    "latte_class": partial(check_network, guided=True),
    "latte_img_class": check_network,
    "latte_img_uncond": check_network,
    "diffusion": check_diffusion,
    "transforms": check_transforms,
    "frechet": check_frechet,
    "train_trajectory": check_trajectory,
}
