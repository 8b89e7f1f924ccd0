"""Reference implementation of the official algorithm, at the cost of the official code.

Checked against the outputs of the official code (tests/goldens). It keeps every property of that code that costs time:
tokens moved between "frames by tokens" and "tokens by frames" around every block, the condition repeated for every
frame and every token position and modulated in each row, packed queries, keys and values copied, scores of softmax
attention held in memory, each coefficient of the diffusion copied from the host and broadcast to a whole clip, AdamW
with torch's defaults, gradient norm and EMA parameter by parameter, and a wait for the loss in every step. Formulas and
small parts of equal cost are ours. Like that code, it has only interleaved layers, uniform patches and adaLN.

Letters: B clips, F frames, I images, C channels, N tokens per frame, D width; R rows of length L.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any, cast

import torch
from einops import rearrange, repeat
from timm.layers import Mlp, PatchEmbed
from torch import Tensor, nn

from diffusion import DiffusionConfig, GaussianDiffusion
from models.config import LatteConfig
from models.embeddings import unpatchify
from models.latte import Latte

# ---- the network -------------------------------------------------------------------------------


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Modulates rows (R, L, D), each with its own shift and scale (R, D)."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class PlainAttention(nn.Module):
    """Softmax attention of rows (R, L, D) that stores all scores."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.scale = num_heads, (width // num_heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "r l (three h d) -> three r h l d", three=3, h=self.num_heads).contiguous()
        weights = ((q @ k.transpose(-2, -1)) * self.scale).softmax(dim=-1)  # (R, heads, L, L)
        return self.proj(rearrange(weights @ v, "r h l d -> r l (h d)"))


class PlainBlock(nn.Module):
    """adaLN-zero block over rows (R, L, D), each with a condition (R, D)."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = PlainAttention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width, int(width * mlp_ratio), act_layer=partial(nn.GELU, approximate="tanh"))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


class ReferenceLatte(Latte):
    """The official network: our `Latte` with other blocks and forward pass, and the same state dict and outputs.

    Raises: ValueError for a network that the official code does not have.
    """

    def __init__(self, config: LatteConfig, **sizes: Any) -> None:
        options = (config.variant, config.patch_embedding, config.injection, config.temporal_position)
        if options != ("interleaved", "uniform", "adaln", "absolute"):
            raise ValueError(f"the reference has interleaved, uniform, adaln, absolute, not {', '.join(options)}")
        super().__init__(config, **sizes)
        width, depth, num_heads, patch = config.size
        self.x_embedder = PatchEmbed(self.latent_size[0], patch, self.in_channels, width)
        self.blocks = nn.ModuleList(PlainBlock(width, num_heads, config.mlp_ratio) for _ in range(depth))

    @classmethod
    def like(cls, model: Latte) -> ReferenceLatte:
        """Returns a copy of `model`, on its device."""
        sizes = {"in_channels": model.in_channels, "latent_size": model.latent_size, "num_frames": model.num_frames}
        plain = cls(model.config, **sizes)
        plain.load_state_dict(model.state_dict())
        return plain.to(model.pos_embed.device).train(model.training)

    def forward(self, x: Tensor, timesteps: Tensor, labels: Tensor | None = None, *, num_images: int = 0) -> Tensor:  # type: ignore[override]
        """Predicts as `models.Latte.forward`: (B, F+I, C, H, W) -> (B, F+I, C or 2C, H, W)."""
        batch, frames = len(x), x.shape[1] - num_images
        x = self.x_embedder(rearrange(x, "b f c h w -> (b f) c h w")) + self.pos_embed  # (B*(F+I), N, D)
        time = self.t_embedder(timesteps)  # (B, D)
        by_frame = repeat(time, "b d -> (b f) d", f=frames + num_images)
        by_token = repeat(time, "b d -> (b n) d", n=x.shape[1])
        if labels is not None:
            embedded = self.y_embedder(labels.reshape(batch, -1))  # (B, 1 or 1+I, D)
            clip = repeat(embedded[:, 0], "b d -> b f d", f=frames)
            by_frame = by_frame + rearrange(torch.cat([clip, embedded[:, 1:]], dim=1), "b f d -> (b f) d")
            by_token = by_token + repeat(embedded[:, 0], "b d -> (b n) d", n=x.shape[1])
        for index in range(0, len(self.blocks), 2):
            x = self.blocks[index](x, by_frame)
            x = rearrange(x, "(b f) n d -> (b n) f d", b=batch)
            clip, images = x[:, :frames], x[:, frames:]
            if index == 0:
                clip = clip + cast(Tensor, self.temp_embed)
            clip = self.blocks[index + 1](clip, by_token)
            x = torch.cat([clip, images], dim=1) if num_images else clip
            x = rearrange(x, "(b n) f d -> (b f) n d", b=batch)
        x = self.final_layer(x[:, None], by_frame[:, None, None], 1)  # (B*(F+I), 1, N, p*p*C)
        return rearrange(unpatchify(x, self.grid, self.patch_size), "(b f) 1 c h w -> b f c h w", b=batch)


# ---- the diffusion -----------------------------------------------------------------------------


class ReferenceDiffusion(GaussianDiffusion):
    """Diffusion with learned variance and noise prediction. Its float64 tables stay on the host."""

    def __init__(self, num_steps: int = 1000, respacing: str = "") -> None:
        super().__init__(DiffusionConfig(num_steps=num_steps), respacing=respacing)

    def table(self, name: str, timesteps: Tensor, x: Tensor) -> Tensor:
        """Copies table `name` from the host and broadcasts its entries at `timesteps` to the shape of `x`."""
        values = self.tables[name].to(timesteps.device)[timesteps].float()
        return values[:, None, None, None, None] + torch.zeros(x.shape, device=timesteps.device)

    def network_timesteps(self, timesteps: Tensor) -> Tensor:
        """Returns the timesteps of the full process, copied from the host."""
        return self.timestep_map.to(timesteps.device)[timesteps]

    def target(self, x_start: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Returns the noise itself."""
        return noise

    def q_posterior_mean(self, x_start: Tensor, x: Tensor, timesteps: Tensor) -> Tensor:
        """Returns the mean of q(x_{t-1} | x_t, x_0); also reads its variance, which the official code never uses."""
        self.table("posterior_variance", timesteps, x)
        return super().q_posterior_mean(x_start, x, timesteps)


def guided_network(network: Callable[..., Tensor], scale: float) -> Callable[..., Tensor]:
    """Adds classifier-free guidance for 2B clips whose second half is ignored, as in the official loop.

    The labels are (2B,): the classes, then the null label.
    """

    def call(x: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        half = x[: len(x) // 2]
        output = network(torch.cat([half, half]), timesteps, labels)
        noise, rest = output.split(x.shape[2], dim=2)
        conditional, unconditional = noise.chunk(2)
        mixed = unconditional + scale * (conditional - unconditional)
        return torch.cat([torch.cat([mixed, mixed]), rest], dim=2)

    return call


# ---- the training step -------------------------------------------------------------------------


class ReferenceTraining:
    """The body of the official training loop, after encoding, with its learning rate 1e-4 and EMA decay 0.9999.

    Args:
        model: trained in place.
        clip: clip the gradient to a norm of 0.1, as the official code does from step 20,000 on.
        autocast_dtype: of the network; the official code has no autocast.
    """

    def __init__(self, model: ReferenceLatte, *, clip: bool = False, autocast_dtype: torch.dtype | None = None) -> None:
        self.model, self.clip, self.autocast_dtype = model, clip, autocast_dtype
        self.diffusion = ReferenceDiffusion()
        self.average = deepcopy(model).requires_grad_(False).eval()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda _: 1.0)
        self.running_loss, self.gradient_norm = 0.0, torch.tensor(0.0)

    def step(self, latents: Tensor, labels: Tensor | None = None, *draws: Tensor, num_images: int = 0) -> float:
        """Runs one step on latents (B, F+I, C, H, W); `draws` are timesteps and noise, drawn here if absent."""
        if not draws:
            timesteps = torch.randint(0, self.diffusion.num_timesteps, (len(latents),), device=latents.device)
            draws = timesteps, torch.randn_like(latents)

        def network(x: Tensor, t: Tensor) -> Tensor:
            with torch.autocast(x.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
                return self.model(x, t, labels, num_images=num_images)

        loss = self.diffusion.training_losses(network, latents, *draws).loss.mean()
        loss.backward()
        self.clip_gradients()
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.update_average()
        value = loss.item()
        self.running_loss += value
        return value

    def clip_gradients(self) -> None:
        """Computes the norm of all gradients from the norm of each, and clips them if asked to."""
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        self.gradient_norm = torch.norm(torch.stack([torch.norm(gradient, 2.0) for gradient in gradients]), 2.0)
        if self.clip:
            factor = torch.clamp(0.1 / (self.gradient_norm + 1e-6), max=1.0)
            for gradient in gradients:
                gradient.mul_(factor)

    @torch.no_grad()
    def update_average(self) -> None:
        """Updates the EMA tensor by tensor, position embeddings included."""
        averages = self.average.state_dict()
        for name, value in self.model.state_dict().items():
            averages[name].mul_(0.9999).add_(value, alpha=1 - 0.9999)
