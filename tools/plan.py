"""Plans a training: memory, time, and changes that make it fit.

    python -m tools.plan --config configs/ffs/ffs_train.yaml --gpu a100-80 --gpus 8 [--mfu 0.4] [section.key=value ...]

Memory is counted, not guessed: parameters on the meta device, and what autograd keeps for the backward pass by
running the network's forward on tensors without data. Time is arithmetic: three forwards a step at a stated share of
the GPU's peak (MFU), the optimiser's traffic at its memory bandwidth, and of the exchange of gradients what the
backward pass cannot hide. docs/planning.md says how near it comes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine import cli
from engine.build import build_model, count_parameters, forward_inputs, macs_per_clip, put_adapters
from engine.config import Config, OptimConfig, SampleConfig, TrainConfig, load_config
from engine.memory import FROZEN_BYTES, STATE_BYTES

GIB = 2**30
RESERVE = 0.08  # of the memory: CUDA context, workspaces, fragments
UPDATE_BYTES = 28 + 12 + 4  # a parameter, read and written: AdamW, average, norm
VAE_ENCODE_FLOP = 0.273e12 / 256**2  # a pixel, of Stable Diffusion's autoencoder
KEPT_WHEN_COMPILED = (
    "mm", "addmm", "bmm", "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu",
)  # fmt: skip
BACKWARD_SHARE = 2 / 3  # of a step's arithmetic, behind which the exchange of gradients can hide
PER_NODE = 8
LARGEST_BATCH = 128


@dataclass(frozen=True)
class Gpu:
    """A GPU's data sheet: dense TFLOP/s by precision, memory in GB, bandwidths in GB/s.

    `link` is one GPU's to the others of its node, one way; `network` its share of the node's to other nodes.
    """

    bf16: float
    tf32: float
    fp32: float
    memory: float
    bandwidth: float
    link: float
    network: float = 50.0  # 400 Gbit/s a GPU


# fmt: off
GPUS = {  #            bf16   tf32  fp32 memory bandwidth link network
    "h200":       Gpu(989.0, 494.0, 67.0, 141.0, 4800.0, 450.0),
    "h100":       Gpu(989.0, 494.0, 67.0,  80.0, 3350.0, 450.0),
    "a100-80":    Gpu(312.0, 156.0, 19.5,  80.0, 2039.0, 300.0, 25.0),
    "a100-40":    Gpu(312.0, 156.0, 19.5,  40.0, 1555.0, 300.0, 25.0),
    "l40s":       Gpu(362.0, 183.0, 91.6,  48.0,  864.0,  32.0, 25.0),
    "rtx4090":    Gpu(165.2,  82.6, 82.6,  24.0, 1008.0,  32.0, 3.0),
    "rtx3090":    Gpu( 71.0,  35.6, 35.6,  24.0,  936.0,  32.0, 3.0),
}
# fmt: on


@dataclass(frozen=True)
class Need:
    """Cost of one step of a config on one GPU: bytes, seconds, FLOP."""

    parameters: int
    states: dict[str, float]
    activations: float
    capacity: float
    flop: float
    encoding_flop: float
    compute_s: float
    encoding_s: float
    update_s: float
    exchange_s: float

    @property
    def memory(self) -> float:
        return sum(self.states.values()) + self.activations

    @property
    def fits(self) -> bool:
        return self.memory <= self.capacity * (1 - RESERVE)

    @property
    def step_s(self) -> float:
        return self.compute_s + self.encoding_s + self.update_s + self.exchange_s


@dataclass(frozen=True)
class Network:
    """Facts of a config's network: parameter counts, FLOP of a clip's forward pass, bytes kept."""

    parameters: int  # that are trained
    frozen: int
    forward_flop: float
    kept: tuple[float, float]
    kept_by_layer: float  # of a clip, without checkpointing


def network_of(config: Config) -> Network:
    """Counted once for all configs that differ in batch, schedule or names only."""
    kept = ("precision", "init_from", "compile")
    train = TrainConfig(**{name: getattr(config.train, name) for name in kept})
    return _counted(replace(config, train=train, optim=OptimConfig(), sample=SampleConfig()))


@lru_cache
def _counted(config: Config) -> Network:
    plain = replace(config, model=replace(config.model, gradient_checkpointing=False))
    data = config.data
    model = build_model(config, "meta")
    if config.lora.rank:
        put_adapters(model, config)
    trained = count_parameters(model)
    return Network(
        trained,
        sum(parameter.numel() for parameter in model.parameters()) - trained,
        2 * macs_per_clip(config) * (data.num_frames + data.num_images) / data.num_frames,
        kept_for_backward(config),
        kept_for_backward(plain)[1] / config.model.size.depth,
    )


def kept_for_backward(config: Config) -> tuple[float, float]:
    """Bytes that are kept of one forward: (whatever the batch, for each clip). Nothing is computed.

    Of a checkpointed network these are the inputs of its blocks; of a compiled one these, and in each block products
    and attention.
    """
    two, three = (_kept(config, batch) for batch in (2, 3))  # of a single clip some copies are views
    return 3 * two - 2 * three, three - two


def _kept(config: Config, batch: int) -> float:
    kept: dict[int, Any] = {}  # storages, each once, and kept alive so that no address comes twice
    model = build_model(config, "meta")
    if config.lora.rank:
        put_adapters(model, config)
    with FakeTensorMode():
        _take_to_cpu(model)
        own = {id_of(value) for value in (*model.parameters(), *model.buffers())}
        inputs = forward_inputs(config, batch, "cpu")

        def pack(value: torch.Tensor) -> torch.Tensor:
            if id_of(value) not in own:
                kept[id_of(value)] = value.untyped_storage()
            return value

        if config.train.compile and not config.model.gradient_checkpointing:
            for block in model.blocks:
                block.forward = _as_compiled(block.forward, pack)
        half = torch.autocast("cpu", torch.bfloat16, enabled=config.train.precision == "bf16")
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value), half:
            model(**inputs)
        return float(sum(storage.nbytes() for storage in kept.values()))


def _as_compiled(forward: Callable[..., Any], pack: Callable[[Any], Any]) -> Callable[..., Any]:
    """The same, but `pack` sees what `models.blocks.compile_blocks` keeps: what enters, products and attention."""

    class Kept(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = function(*args, **(kwargs or {}))
            if function.overloadpacket.__name__ in KEPT_WHEN_COMPILED:
                see(found)
            return found

    def see(values: Any) -> None:
        for value in tree_leaves(values):
            if isinstance(value, torch.Tensor):
                pack(value)

    def run(*args: Any, **kwargs: Any) -> Any:
        see((args, kwargs))
        with torch.autograd.graph.saved_tensors_hooks(lambda value: value, lambda value: value), Kept():
            return forward(*args, **kwargs)

    return run


def _take_to_cpu(model: Any) -> None:
    """Weights on the meta device replaced by ones on the CPU: called where tensors have no data there either."""
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                module._parameters[name] = torch.nn.Parameter(
                    torch.empty(value.shape, dtype=value.dtype), value.requires_grad
                )
        for name, value in module._buffers.items():
            if value is not None:
                module._buffers[name] = torch.empty(value.shape, dtype=value.dtype)


def id_of(value: Any) -> int:
    """The address of a tensor's storage object."""
    return value.untyped_storage()._cdata


def need(config: Config, gpu: Gpu, gpus: int, mfu: float) -> Need:
    """Returns the cost of a step of `config` on each of `gpus` GPUs."""
    train, data = config.train, config.data
    network = network_of(config)
    parameters = network.parameters
    sharded = train.parallel == "fsdp" and gpus > 1
    states = {name: size * parameters / (gpus if sharded else 1) for name, size in STATE_BYTES.items()}
    if train.precision == "bf16":
        states["bf16 copy"] = 2 * parameters
    if network.frozen:
        states["frozen weights"] = FROZEN_BYTES.get(train.precision, 4) * network.frozen
    fixed, per_clip = network.kept
    if config.model.gradient_checkpointing:  # the layer that is recomputed
        per_clip += network.kept_by_layer
    clips = train.batch_size * train.grad_accum_steps
    passes = 2 if network.frozen else 3  # gradients of frozen weights are not computed
    flop = passes * network.forward_flop * clips
    encoding = VAE_ENCODE_FLOP * data.image_size**2 * (data.num_frames + data.num_images) * clips
    encoding *= config.codec.path is not None and not getattr(data, "latents", None)
    rate = 1e12 * mfu * getattr(gpu, {"bf16": "bf16", "tf32": "tf32"}.get(train.precision, "fp32"))
    compute = flop * ((passes + 1) / passes if config.model.gradient_checkpointing else 1) / rate
    exchange = exchange_seconds(parameters, gpu, gpus, sharded=sharded, accumulation=train.grad_accum_steps)
    return Need(
        parameters=parameters,
        states=states,
        activations=max(0.0, fixed - states.get("bf16 copy", 0)) + per_clip * train.batch_size,
        capacity=gpu.memory * 1e9,
        flop=flop,
        encoding_flop=encoding,
        compute_s=compute,
        encoding_s=encoding / rate,
        update_s=UPDATE_BYTES * parameters / (gpus if sharded else 1) / (gpu.bandwidth * 1e9),
        exchange_s=max(0.0, exchange - BACKWARD_SHARE * compute),
    )


def exchange_seconds(parameters: int, gpu: Gpu, gpus: int, *, sharded: bool, accumulation: int) -> float:
    """A ring over all GPUs, as fast as its slowest link: fp32 gradients, and with FSDP the weights in bf16.

    DDP sends each gradient twice around, once a step. FSDP sends it once and gathers the weights for the forward and
    for the backward of every micro-step.
    """
    if gpus == 1:
        return 0.0
    speed = gpu.link if gpus <= PER_NODE else gpu.network
    sent = parameters * (4 * 1 + 2 * 2 * accumulation if sharded else 4 * 2)
    return sent * (gpus - 1) / gpus / (speed * 1e9)


# ---- what to change ----------------------------------------------------------------------------------


def changes(config: Config, gpus: int) -> Iterator[list[str]]:
    """Overrides that need less memory and leave the global batch as it is, the cheapest first."""
    first = [] if config.train.precision == "bf16" else ["train.precision=bf16"]
    larger = [[]] if config.model.gradient_checkpointing else [[], ["model.gradient_checkpointing=true"]]
    sharding = [[], ["train.parallel=fsdp"]] if gpus > 1 and config.train.parallel != "fsdp" else [[]]
    for shard in sharding:
        for checkpointing in larger:
            batch, accumulation = config.train.batch_size, config.train.grad_accum_steps
            while True:
                split = [f"train.batch_size={batch}", f"train.grad_accum_steps={accumulation}"]
                changed = split if batch != config.train.batch_size else []
                yield [*first, *changed, *checkpointing, *shard]
                if batch % 2:
                    break
                batch, accumulation = batch // 2, accumulation * 2


def advice(config: Config, gpu: Gpu, gpus: int, mfu: float) -> tuple[list[str], Need] | None:
    """The first of `changes` that fits and is within a twentieth of the fastest that does; None where none does."""
    tried = [(each, load_config(None, each, base=config.to_dict())) for each in changes(config, gpus)]
    found = [(each, need(changed, gpu, gpus, mfu)) for each, changed in tried]
    fitting = [(each, needs) for each, needs in found if needs.fits]
    fastest = min((needs.step_s for _, needs in fitting), default=0.0)
    return next(((each, needs) for each, needs in fitting if needs.step_s <= 1.05 * fastest), None)


def largest_batch(config: Config, gpu: Gpu, gpus: int, mfu: float) -> int:
    """The largest batch_size of the config that fits, 0 for none."""
    needs = [
        need(load_config(None, [f"train.batch_size={size}"], base=config.to_dict()), gpu, gpus, mfu) for size in (1, 2)
    ]
    per_clip = needs[1].memory - needs[0].memory
    room = needs[0].capacity * (1 - RESERVE) - (needs[0].memory - per_clip)
    return max(0, min(LARGEST_BATCH, int(room // per_clip)))


# ---- the report --------------------------------------------------------------------------------------


def report(config: Config, name: str, gpus: int, mfu: float) -> dict[str, Any]:
    """All figures, JSON-able."""
    gpu = GPUS[name]
    found = need(config, gpu, gpus, mfu)
    clips = config.train.batch_size * config.train.grad_accum_steps * gpus
    better = None if found.fits and config.train.precision == "bf16" else advice(config, gpu, gpus, mfu)
    return {
        "gpu": name,
        "gpus": gpus,
        "mfu": mfu,
        "needs": asdict(found) | {"memory": found.memory, "fits": found.fits, "step_s": found.step_s},
        "largest_batch_size": largest_batch(config, gpu, gpus, mfu),
        "videos_per_second": clips / found.step_s,
        "hours": found.step_s * config.train.max_steps / 3600,
        "max_steps": config.train.max_steps,
        "global_batch_size": clips,
        "change": None
        if better is None
        else {"overrides": better[0], "memory": better[1].memory, "step_s": better[1].step_s},
    }


def lines(found: dict[str, Any], config: Config) -> Iterator[str]:
    """The report for people, at 80 columns."""
    needs = found["needs"]
    trained = "trained " if config.lora.rank else ""
    size = f"{needs['parameters'] / 1e6:.1f} M {trained}parameters"
    yield f"{config.model.name}, {size}, on {found['gpus']} x {found['gpu']}"
    yield ""
    yield "memory of a GPU                            GiB"
    for part, size in {**needs["states"], "kept for the backward pass": needs["activations"]}.items():
        yield f"  {part:36s}{size / GIB:8.2f}"
    verdict = "fits" if needs["fits"] else "DOES NOT FIT"
    yield f"  {'together':36s}{needs['memory'] / GIB:8.2f}  of {needs['capacity'] / GIB:.1f}: {verdict}"
    yield f"  largest train.batch_size              {found['largest_batch_size']:6d}"
    yield ""
    yield f"time of a step, at {found['mfu']:.0%} of the peak              ms"
    for part in ("compute", "encoding", "update", "exchange"):
        yield f"  {TIMES[part]:36s}{1000 * needs[f'{part}_s']:8.1f}"
    yield f"  {'together':36s}{1000 * needs['step_s']:8.1f}"
    yield ""
    yield (
        f"{found['videos_per_second']:.1f} clips a second in batches of {found['global_batch_size']}; "
        f"{found['max_steps']:,} steps take {found['hours']:,.0f} hours"
    )
    if found["change"]:
        better = found["change"]
        yield f"better: {' '.join(better['overrides']) or 'as it is'}"
        yield f"  {better['memory'] / GIB:.1f} GiB, {1000 * better['step_s']:.0f} ms a step"
    elif not needs["fits"]:
        yield "nothing here makes it fit: take a smaller model.name, fewer frames, or a larger GPU"
    if needs["encoding_s"]:
        yield "encoding is done once and for all with tools.cache_latents (data.latents=PATH)"


TIMES = {
    "compute": "forward and backward",
    "encoding": "encoding the videos (SD's autoencoder)",
    "update": "optimiser and average",
    "exchange": "exchange that nothing hides",
}


def main(argv: list[str]) -> int:
    """Plan what the command line says."""
    parser = cli.config_parser(__doc__ or "", "%(prog)s --config FILE [--gpu NAME] [key=value ...]")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--gpu", default="h100", metavar="NAME", help=f"{', '.join(GPUS)} (h100)")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="processes, one a GPU (1)")
    parser.add_argument("--mfu", type=float, default=0.4, metavar="X", help="share of the peak that is reached (0.4)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    given = parser.parse_intermixed_args(argv)
    if given.gpu not in GPUS:
        raise ValueError(f"--gpu {given.gpu} is unknown; one of {', '.join(GPUS)}.")
    if given.gpus < 1 or not 0 < given.mfu <= 1:
        raise ValueError("--gpus must be at least 1, and --mfu above 0 and at most 1.")

    config = load_config(given.config, given.overrides)
    found = report(config, given.gpu, given.gpus, given.mfu)
    print(json.dumps(found, indent=2) if given.json else "\n".join(lines(found, config)))
    return 0


if __name__ == "__main__":
    cli.run(main)
