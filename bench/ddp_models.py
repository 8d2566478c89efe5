"""Models of bench/ddp.py and their data: an MLP, a convolutional network, and the GPT of examples/gpt.py on its text."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import nn
from torch.nn import functional

Loss = Callable[[nn.Module], torch.Tensor]
MLP_WIDTHS = (784, 2048, 2048, 2048, 10)  # 10 M parameters
CHANNELS = (3, 32, 64, 128)
GPT_WIDTH, GPT_LAYERS, CONTEXT = 192, 3, 64  # 1.4 M parameters
MODELS = ("mlp", "conv", "gpt")


def made(name: str) -> tuple[nn.Module, Callable[[int], Callable[[], Loss]]]:
    """A model with parameters that are the same in every process; data(rank) gives a rank's batches, one loss for each."""
    torch.manual_seed(0)
    return {"mlp": _mlp, "conv": _conv, "gpt": _gpt}[name]()


def _mlp() -> tuple[nn.Module, Callable[[int], Callable[[], Loss]]]:
    layers = [layer for pair in itertools.pairwise(MLP_WIDTHS) for layer in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*layers[:-1]), lambda rank: _classes(rank, (32, MLP_WIDTHS[0]))


def _conv() -> tuple[nn.Module, Callable[[int], Callable[[], Loss]]]:
    """Images of 32 x 32 in 10 classes; 0.3 M parameters."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(CHANNELS):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Flatten(), nn.Linear(CHANNELS[-1] * 16, 96), nn.ReLU(), nn.Linear(96, 10)]
    return nn.Sequential(*layers), lambda rank: _classes(rank, (16, CHANNELS[0], 32, 32))


def _gpt() -> tuple[nn.Module, Callable[[int], Callable[[], Loss]]]:
    gpt = _example("gpt")
    text, letters = gpt.encoded_text()

    def data(rank: int) -> Callable[[], Loss]:
        draw = torch.Generator().manual_seed(rank)

        def one() -> Loss:
            x, y = gpt.batch(text, 4, CONTEXT, draw)
            return lambda model: functional.cross_entropy(model(x).flatten(0, 1), y.flatten())

        return one

    return gpt.GPT(len(letters), GPT_WIDTH, GPT_LAYERS, CONTEXT), data


def _example(name: str) -> ModuleType:
    """An example as a module. sys.path stays as it is: `fleet run` imports less before the fork where a script changes that."""
    path = Path(__file__).resolve().parent.parent / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _classes(rank: int, shape: tuple[int, ...]) -> Callable[[], Loss]:
    """One batch of a rank's own, again and again."""
    draw = torch.Generator().manual_seed(rank)
    x, y = torch.randn(shape, generator=draw), torch.randint(10, shape[:1], generator=draw)
    return lambda: lambda model: functional.cross_entropy(model(x), y)
