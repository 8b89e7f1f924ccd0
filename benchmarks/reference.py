"""Reference implementation of the official algorithm, at the cost of the official code.

Checked against the outputs of the official code (tests/goldens). It keeps each property of that code that costs time:
tokens moved between "frames by tokens" and "tokens by frames" around every block, the condition repeated for every
frame and every token position and modulated in each row, packed queries, keys and values copied, scores of softmax
attention held in memory, each coefficient of the diffusion copied from the host and broadcast to a whole clip, AdamW
with torch's defaults, a norm and an average parameter by parameter, and a wait for the loss in every step. It adds
nothing that the official code does not do. Interleaved layers, uniform patches and adaLN only, as there.

Letters: B clips, F frames, I images, C channels, N tokens per frame, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial

import numpy as np
import torch
from einops import rearrange, repeat
from timm.layers import Mlp, PatchEmbed
from torch import Tensor, nn

from diffusion.losses import NATS_PER_BIT, discretized_gaussian_log_likelihood, normal_kl
from diffusion.schedule import gaussian_tables, linear_betas, respace_betas, respace_timesteps
from models.config import LatteConfig
from models.embeddings import timestep_features
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


class PlainFinal(nn.Module):
    """Final layer, modulated by rows."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class PlainTimestep(nn.Module):
    """Timestep MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, timesteps: Tensor) -> Tensor:
        return self.mlp(timestep_features(timesteps, 256, torch.float32))


class PlainLabel(nn.Module):
    """Label embedding."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(rows, width)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


class ReferenceLatte(nn.Module):
    """The official network, with the state dict and the outputs of our `Latte`.

    Raises: ValueError for a network that the official code does not have.
    """

    def __init__(
        self, config: LatteConfig, *, in_channels: int = 4, latent_size: int = 32, num_frames: int = 16
    ) -> None:
        super().__init__()
        options = (config.variant, config.patch_embedding, config.injection, config.temporal_position)
        if options != ("interleaved", "uniform", "adaln", "absolute"):
            raise ValueError(f"the reference has interleaved, uniform, adaln, absolute, not {', '.join(options)}")
        width, depth, num_heads, self.patch_size = config.size
        self.config, self.in_channels = config, in_channels
        self.out_channels = in_channels * (2 if config.learn_sigma else 1)
        self.x_embedder = PatchEmbed(latent_size, self.patch_size, in_channels, width)
        self.t_embedder = PlainTimestep(width)
        if config.num_classes:
            self.y_embedder = PlainLabel(config.num_classes + config.has_null_label, width)
        tokens = self.x_embedder.num_patches
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, width), requires_grad=False)
        self.temp_embed = nn.Parameter(torch.zeros(1, num_frames, width), requires_grad=False)
        self.blocks = nn.ModuleList(PlainBlock(width, num_heads, config.mlp_ratio) for _ in range(depth))
        self.final_layer = PlainFinal(width, self.patch_size**2 * self.out_channels)

    @classmethod
    def like(cls, model: Latte) -> ReferenceLatte:
        """Returns a copy of `model`, on its device."""
        size = model.latent_size[0]
        plain = cls(model.config, in_channels=model.in_channels, latent_size=size, num_frames=model.num_frames)
        plain.load_state_dict(model.state_dict())
        return plain.to(model.pos_embed.device).train(model.training)

    def forward(self, x: Tensor, timesteps: Tensor, labels: Tensor | None = None, *, num_images: int = 0) -> Tensor:
        """Predicts as `models.Latte.forward`: (B, F+I, C, H, W) -> (B, F+I, C or 2C, H, W)."""
        batch, frames = len(x), x.shape[1] - num_images
        x = self.x_embedder(rearrange(x, "b f c h w -> (b f) c h w")) + self.pos_embed  # (B*(F+I), N, D)
        time = self.t_embedder(timesteps)  # (B, D)
        by_frame = repeat(time, "b d -> (b f) d", f=frames + num_images)
        by_token = repeat(time, "b d -> (b n) d", n=x.shape[1])
        label_by_frame = label_by_token = None
        if labels is not None:
            label_by_frame, label_by_token = self._labels(labels.reshape(batch, -1), frames, x.shape[1])
        for index in range(0, len(self.blocks), 2):
            x = self.blocks[index](x, by_frame if label_by_frame is None else by_frame + label_by_frame)
            x = rearrange(x, "(b f) n d -> (b n) f d", b=batch)
            clip, images = x[:, :frames], x[:, frames:]
            if index == 0:
                clip = clip + self.temp_embed
            clip = self.blocks[index + 1](clip, by_token if label_by_token is None else by_token + label_by_token)
            x = torch.cat([clip, images], dim=1) if num_images else clip
            x = rearrange(x, "(b n) f d -> (b f) n d", b=batch)
        x = self.final_layer(x, by_frame if label_by_frame is None else by_frame + label_by_frame)
        return rearrange(self._unpatchify(x), "(b f) c h w -> b f c h w", b=batch)

    def _labels(self, labels: Tensor, frames: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Embeds labels (B, 1 or 1+I) in rows for spatial (B*(F+I), D) and for temporal (B*N, D) blocks."""
        embedded = self.y_embedder(labels)
        clip = repeat(embedded[:, 0], "b d -> b f d", f=frames)
        by_frame = rearrange(torch.cat([clip, embedded[:, 1:]], dim=1), "b f d -> (b f) d")
        return by_frame, repeat(embedded[:, 0], "b d -> (b n) d", n=tokens)

    def _unpatchify(self, x: Tensor) -> Tensor:
        side, patch = int(x.shape[1] ** 0.5), self.patch_size
        x = x.reshape(len(x), side, side, patch, patch, self.out_channels)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(len(x), self.out_channels, side * patch, side * patch)


# ---- the diffusion -----------------------------------------------------------------------------


class ReferenceDiffusion:
    """Diffusion with learned variance and noise prediction. Its float64 tables are on the host."""

    def __init__(self, num_steps: int = 1000, respacing: str = "") -> None:
        self.kept = respace_timesteps(num_steps, respacing)
        tables = gaussian_tables(respace_betas(linear_betas(num_steps), self.kept))
        self.tables: dict[str, np.ndarray] = {name: table.numpy() for name, table in tables.items()}
        self.num_timesteps = len(self.kept)

    def entry(self, name: str, timesteps: Tensor, x: Tensor) -> Tensor:
        """Copies table `name` at `timesteps` from the host and broadcasts it to the shape of `x`."""
        values = torch.from_numpy(self.tables[name]).to(timesteps.device)[timesteps].float()
        return values[:, None, None, None, None] + torch.zeros(x.shape, device=timesteps.device)

    def network_timesteps(self, timesteps: Tensor) -> Tensor:
        """Returns the timesteps of the full process."""
        return torch.tensor(self.kept, device=timesteps.device, dtype=timesteps.dtype)[timesteps]

    def q_sample(self, x_start: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        """Returns the noisy clip."""
        signal = self.entry("sqrt_alphas_cumprod", timesteps, x_start)
        return signal * x_start + self.entry("sqrt_one_minus_alphas_cumprod", timesteps, x_start) * noise

    def q_posterior(self, x_start: Tensor, x: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns mean, variance and log variance of q(x_{t-1} | x_t, x_0)."""
        mean = self.entry("posterior_mean_coef1", timesteps, x) * x_start
        mean = mean + self.entry("posterior_mean_coef2", timesteps, x) * x
        variance = self.entry("posterior_variance", timesteps, x)
        return mean, variance, self.entry("posterior_log_variance_clipped", timesteps, x)

    def p_mean_variance(self, output: Tensor, x: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns mean and log variance of p(x_{t-1} | x_t), and the predicted clean clip."""
        noise, values = output.split(x.shape[2], dim=2)
        smallest = self.entry("posterior_log_variance_clipped", timesteps, x)
        largest = self.entry("log_betas", timesteps, x)
        share = (values + 1) / 2
        log_variance = share * largest + (1 - share) * smallest
        torch.exp(log_variance)  # the unused variance of the official code
        x_start = self.entry("sqrt_recip_alphas_cumprod", timesteps, x) * x
        x_start = x_start - self.entry("sqrt_recipm1_alphas_cumprod", timesteps, x) * noise
        mean, _, _ = self.q_posterior(x_start, x, timesteps)
        return mean, log_variance, x_start

    def training_loss(
        self, network: Callable[..., Tensor], x_start: Tensor, timesteps: Tensor, noise: Tensor
    ) -> Tensor:
        """Returns squared error plus variational bound, (B,)."""
        x = self.q_sample(x_start, timesteps, noise)
        output = network(x, self.network_timesteps(timesteps)).float()
        predicted, values = output.split(x.shape[2], dim=2)
        frozen = torch.cat([predicted.detach(), values], dim=2)
        return _mean(frozen_bound(self, frozen, x_start, x, timesteps)) + _mean((noise - predicted) ** 2)

    @torch.no_grad()
    def sample(
        self, network: Callable[..., Tensor], x: Tensor, method: str = "ddpm", steps: int | None = None
    ) -> Tensor:
        """Samples from noise `x` by `ddpm` or `ddim` (eta 0); runs the first `steps` steps (default: all)."""
        step = {"ddpm": self.ddpm_step, "ddim": self.ddim_step}[method]
        for index in list(range(self.num_timesteps))[::-1][:steps]:
            timesteps = torch.tensor([index] * len(x), device=x.device)
            x = step(network(x, self.network_timesteps(timesteps)).float(), x, timesteps)
        return x

    def ddpm_step(self, output: Tensor, x: Tensor, timesteps: Tensor) -> Tensor:
        """Returns x_{t-1} by DDPM from the network's output at x_t."""
        mean, log_variance, _ = self.p_mean_variance(output, x, timesteps)
        noise = torch.randn_like(x)
        moving = (timesteps != 0).float()[:, None, None, None, None]
        return mean + moving * torch.exp(0.5 * log_variance) * noise

    def ddim_step(self, output: Tensor, x: Tensor, timesteps: Tensor) -> Tensor:
        """Returns x_{t-1} by DDIM; draws the noise although eta is 0, as the official code does."""
        _, _, x_start = self.p_mean_variance(output, x, timesteps)
        noise = self.entry("sqrt_recip_alphas_cumprod", timesteps, x) * x - x_start
        noise = noise / self.entry("sqrt_recipm1_alphas_cumprod", timesteps, x)
        now, previous = (self.entry(name, timesteps, x) for name in ("alphas_cumprod", "alphas_cumprod_prev"))
        sigma = 0.0 * torch.sqrt((1 - previous) / (1 - now)) * torch.sqrt(1 - now / previous)
        mean = x_start * torch.sqrt(previous) + torch.sqrt(1 - previous - sigma**2) * noise
        moving = (timesteps != 0).float()[:, None, None, None, None]
        return mean + moving * sigma * torch.randn_like(x)


def frozen_bound(
    diffusion: ReferenceDiffusion, output: Tensor, x_start: Tensor, x: Tensor, timesteps: Tensor
) -> Tensor:
    """Returns the variational bound of every value in bits, (B, F, C, H, W); at t = 0 that of the decoder."""
    true_mean, _, true_log_variance = diffusion.q_posterior(x_start, x, timesteps)
    mean, log_variance, _ = diffusion.p_mean_variance(output, x, timesteps)
    divergence = normal_kl(true_mean, true_log_variance, mean, log_variance)
    decoder = -discretized_gaussian_log_likelihood(x_start, mean, 0.5 * log_variance)
    return torch.where((timesteps == 0)[:, None, None, None, None], decoder, divergence) / NATS_PER_BIT


def _mean(values: Tensor) -> Tensor:
    return values.mean(dim=list(range(1, values.ndim)))


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
    """The body of the official training loop, after encoding.

    Args:
        model: trained in place.
        autocast_dtype: of the network; the official code has no autocast.
        clip: clip the gradient to `max_grad_norm`, as the official code does from step 20,000 on.
    """

    def __init__(
        self,
        model: ReferenceLatte,
        *,
        learning_rate: float = 1e-4,
        max_grad_norm: float = 0.1,
        ema_decay: float = 0.9999,
        clip: bool = False,
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        self.model, self.clip, self.max_grad_norm, self.ema_decay = model, clip, max_grad_norm, ema_decay
        self.autocast_dtype = autocast_dtype
        self.diffusion = ReferenceDiffusion()
        self.average = deepcopy(model).requires_grad_(False).eval()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda _: 1.0)
        self.running_loss, self.gradient_norm = 0.0, torch.tensor(0.0)

    def draw(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Draws timesteps (B,) and noise of the shape of the latents."""
        timesteps = torch.randint(0, self.diffusion.num_timesteps, (len(latents),), device=latents.device)
        return timesteps, torch.randn_like(latents)

    def loss(self, latents: Tensor, labels: Tensor | None, timesteps: Tensor, noise: Tensor, images: int = 0) -> Tensor:
        """Returns the mean loss, to differentiate."""

        def network(x: Tensor, t: Tensor) -> Tensor:
            with torch.autocast(x.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
                return self.model(x, t, labels, num_images=images)

        return self.diffusion.training_loss(network, latents, timesteps, noise).mean()

    def step(self, latents: Tensor, labels: Tensor | None = None, *draws: Tensor, num_images: int = 0) -> float:
        """Runs one step on latents (B, F+I, C, H, W); `draws` are given timesteps and noise, if any."""
        timesteps, noise = draws or self.draw(latents)
        loss = self.loss(latents, labels, timesteps, noise, num_images)
        loss.backward()
        self.gradient_norm = self.clip_gradients()
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.update_average()
        value = loss.item()
        self.running_loss += value
        return value

    def clip_gradients(self) -> Tensor:
        """Returns the norm of all gradients, from the norm of each."""
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        norm = torch.norm(torch.stack([torch.norm(gradient.detach(), 2.0) for gradient in gradients]), 2.0)
        if self.clip:
            factor = torch.clamp(self.max_grad_norm / (norm + 1e-6), max=1.0)
            for gradient in gradients:
                gradient.detach().mul_(factor)
        return norm

    @torch.no_grad()
    def update_average(self) -> None:
        """Updates the EMA parameter by parameter, position embeddings included."""
        averages = dict(self.average.named_parameters())
        for name, parameter in self.model.named_parameters():
            averages[name].mul_(self.ema_decay).add_(parameter.data, alpha=1 - self.ema_decay)
