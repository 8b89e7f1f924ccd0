"""Mathematics of noising and denoising clips (B, F, C, H, W), independent of networks and data."""

from __future__ import annotations

from .conditioning import ConditionConfig, Given, condition_denoiser, sample_given
from .config import DiffusionConfig
from .flow import RectifiedFlow
from .frame_noise import sample_rolling, spread_uniforms
from .gaussian import GaussianDiffusion
from .guidance import Denoiser, guide_denoiser
from .losses import LossTerms
from .samplers import StepOptions, list_evaluations, sample
from .scheduled import ScheduledDiffusion
from .timestep_sampler import LossAwareTimestepSampler, TimestepSampler, build_timestep_sampler
from .weighting import weigh_terms


def build_diffusion(
    config: DiffusionConfig, *, learn_sigma: bool, respacing: str = ""
) -> GaussianDiffusion | RectifiedFlow:
    """Returns the process that `config` describes.

    Args:
        learn_sigma: whether the network outputs 2C channels (`model.learn_sigma`); for a flow always C.
        respacing: steps to keep for sampling: "" for all, "250", "10,15,20", "ddim50"; for a flow, a number.
            Raises ValueError if it is invalid.
    """
    if config.prediction == "flow":
        return RectifiedFlow(config, respacing=respacing)
    return GaussianDiffusion(config, learn_sigma=learn_sigma, respacing=respacing)
