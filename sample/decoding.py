"""Decoding a batch while the next one is sampled: in a thread and, on CUDA, in a stream of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

Decode = Callable[[Sequence[int], Tensor], np.ndarray]
Batch = tuple[list[int], np.ndarray]


class Decoder:
    """Decodes batches in order; with `ahead`, each one while the next is sampled.

    Args:
        decode: (indices of videos, latents (B, F, C, h, w)) -> uint8 (B, F, H, W, 3).
        ahead: decode in the background. It changes no bit of the videos. Where the same cores sample and decode
            (on a CPU), it gains nothing.
    """

    def __init__(self, decode: Decode, device: torch.device, *, ahead: bool) -> None:
        self.decode = decode
        self.executor = ThreadPoolExecutor(1, "decode") if ahead else None
        self.stream = torch.cuda.Stream(device) if ahead and device.type == "cuda" else None
        self.pending: list[tuple[list[int], Future[np.ndarray]]] = []  # at most one

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, *_: object) -> None:
        if self.executor:
            self.executor.shutdown(wait=True, cancel_futures=True)

    def push(self, indices: list[int], latents: Tensor) -> Iterator[Batch]:
        """Take the next batch; yields those that are to be had now."""
        if self.executor is None:
            yield indices, self.decode(indices, latents)
            return
        ready = torch.cuda.current_stream(latents.device).record_event() if self.stream is not None else None
        before = list(self.pending)
        self.pending = [(indices, self.executor.submit(self._in_stream, indices, latents, ready))]
        yield from ((each, future.result()) for each, future in before)

    def rest(self) -> Iterator[Batch]:
        """The batch that is still being decoded, if there is one."""
        yield from ((each, future.result()) for each, future in self.pending)
        self.pending = []

    def _in_stream(self, indices: Sequence[int], latents: Tensor, ready: torch.cuda.Event | None) -> np.ndarray:
        if self.stream is None:
            return self.decode(indices, latents)
        with torch.cuda.stream(self.stream):
            if ready is not None:
                self.stream.wait_event(ready)
            latents.record_stream(self.stream)
            return self.decode(indices, latents)
