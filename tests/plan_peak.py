"""Peak resident memory of two training steps of a config, for tests/test_tools_plan.py: prints bytes.

    MALLOC_MMAP_THRESHOLD_=65536 python tests/plan_peak.py key=value ...

That variable has freed memory go back to the system at once, as the caching allocator of a GPU reuses it; by default
glibc keeps up to twice of what is in use.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from engine.build import build_model
from engine.config import load_config
from engine.optim import EMA, build_optimizer

config = load_config(None, sys.argv[1:])
batch, size = config.train.batch_size, config.latent_size
latents = torch.randn(batch, config.data.num_frames, config.codec.latent_channels, size, size)
torch.randn(64, 64) @ torch.randn(64, 64)  # libraries are loaded at the first product
before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
model = build_model(config)
average, optimizer = EMA(model), build_optimizer(model, config.optim)
for _ in range(2):
    with torch.autocast("cpu", torch.bfloat16, enabled=config.train.precision == "bf16"):
        output = model(latents, torch.zeros(batch))
    output.float().square().mean().backward()
    optimizer.step()
    average.update(model)
    optimizer.zero_grad(set_to_none=True)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)
