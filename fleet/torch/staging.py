"""Tensors on a GPU take part through host copies in pinned memory. CPU tensors pass by it: `Operations` looks at their device."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from fleet.torch.work import Work

log = logging.getLogger("fleet.torch")
_said: set[str] = set()


def staged(reads: int | None, writes: int | None) -> Callable[[Callable[..., Work]], Callable[..., Work]]:
    """An operation that takes CUDA tensors too: its argument number `reads` is copied in, number `writes` back out.

    An argument is a tensor, or lists of tensors. The call blocks until the current stream has done what came before and the
    host has its copies. The Work is done, and its future has its value, when the results are on the GPU.
    """
    places = [place for place in (reads, writes) if place is not None]

    def decorate(operation: Callable[..., Work]) -> Callable[..., Work]:
        @wraps(operation)
        def on_any_device(self: Any, *args: Any) -> Work:
            for place in places:
                if _on_gpu(args[place]):
                    break
            else:
                return operation(self, *args)
            copies = HostCopies()
            on_host = list(args)
            for place in dict.fromkeys(places):
                on_host[place] = copies.of(args[place], read=place == reads, written=place == writes)
            copies.synchronize()
            work = operation(self, *on_host)
            return work.staged(copies.given(work.result()), copies.devices, copies.bring_back)

        return on_any_device

    return decorate


def _on_gpu(x: Any) -> bool:
    """Whether the first tensor is on a GPU. An argument without tensors is on none."""
    while isinstance(x, list | tuple):
        if not x:
            return False
        x = x[0]
    return x is not None and x.is_cuda


class HostCopies:
    """Host copies of one call's CUDA tensors."""

    def __init__(self) -> None:
        self.devices: list[torch.device] = []
        # By the id of a copy: the copy, and what the script gave.
        self._given: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._results: list[tuple[torch.Tensor, torch.Tensor]] = []  # likewise, of what is written

    def of(self, x: Any, read: bool, written: bool) -> Any:
        """`x` with a copy in place of each CUDA tensor. What is read has its values after `synchronize`."""
        if isinstance(x, list | tuple):
            return [self.of(one, read, written) for one in x]
        if x is None or not x.is_cuda or x.layout != torch.strided:
            return x  # fleet refuses the last ones
        _say_once(x.device)
        copy = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=True)
        if read:
            copy.copy_(x.detach(), non_blocking=True)
        if x.device not in self.devices:
            self.devices.append(x.device)
        self._given[id(copy)] = copy, x
        if written:
            self._results.append((copy, x.detach()))
        return copy

    def given(self, copies: Any) -> Any:
        """What the script gave, in place of its copies."""
        if isinstance(copies, list | tuple):
            return [self.given(one) for one in copies]
        return self._given[id(copies)][1] if id(copies) in self._given else copies

    def synchronize(self) -> None:
        """Returns when the copies are made, and nothing that came before uses what will be written."""
        for device in self.devices:
            torch.cuda.current_stream(device).synchronize()

    def bring_back(self) -> None:
        """Copies the results to the GPU, and returns when they are there.

        The stream is one of its own: a kernel in the script's may be waiting for another rank.
        """
        for device in self.devices if self._results else ():
            stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call] # torch lacks its stub
            with torch.cuda.stream(stream):
                for copy, x in self._results:
                    if x.device == device:
                        with torch.inference_mode(x.is_inference()):
                            x.copy_(copy, non_blocking=True)
            stream.synchronize()


def _say_once(device: torch.device) -> None:
    if device.type not in _said:
        _said.add(device.type)
        log.warning(
            "the backend fleet copies tensors on %s to the host and back, which is slow: give it CPU tensors, and these to NCCL",
            device,
        )
