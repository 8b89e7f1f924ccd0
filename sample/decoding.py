"""Decodes latents to uint8 frames and checks them; one batch can decode while the next is sampled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

Batch = tuple[list[int], np.ndarray]  # video indices, and videos as uint8 (B, F, H, W, 3)


def decode_batches(
    batches: Iterable[tuple[list[int], Tensor]],
    decode: Callable[[Sequence[int], Tensor], np.ndarray],
    device: torch.device,
    *,
    ahead: bool,
) -> Iterator[Batch]:
    """Yields (indices, decoded frames) for each (indices, latents (B, F, C, h, w)) of `batches`, in order.

    Args:
        ahead: decode in a thread, on CUDA in a separate stream, while the next batch is sampled. The videos stay
            bit-identical. No faster on a CPU, where the same cores sample and decode.
    """
    if not ahead:
        yield from ((indices, decode(indices, latents)) for indices, latents in batches)
        return
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def decode_in_stream(indices: list[int], latents: Tensor, ready: torch.cuda.Event | None) -> Batch:
        if stream is None or ready is None:
            return indices, decode(indices, latents)
        with torch.cuda.stream(stream):
            stream.wait_event(ready)
            latents.record_stream(stream)
            return indices, decode(indices, latents)

    with ThreadPoolExecutor(1, "decode") as executor:
        pending: Future[Batch] | None = None
        for indices, latents in batches:
            ready = torch.cuda.current_stream(device).record_event() if stream is not None else None
            before, pending = pending, executor.submit(decode_in_stream, indices, latents, ready)
            if before:
                yield before.result()
        if pending:
            yield pending.result()


def require_finite_videos(indices: Sequence[int], latents: Tensor, video: Tensor) -> None:
    """Raises ValueError naming the first of the videos `indices` with latents or pixels that are not finite."""
    finite = latents.isfinite().flatten(1).all(1) & video.isfinite().flatten(1).all(1)
    for index, good in zip(indices, finite.tolist(), strict=True):
        if not good:
            raise ValueError(
                f"video {index} holds NaN or infinity and is not written: use a smaller guidance_scale, "
                "precision=fp32 or another checkpoint."
            )


def to_uint8(video: Tensor) -> np.ndarray:
    """Converts (B, F, 3, H, W) in [-1, 1] to uint8 (B, F, H, W, 3), rounded to nearest."""
    levels = (video.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8)
    return levels.permute(0, 1, 3, 4, 2).contiguous().cpu().numpy()
