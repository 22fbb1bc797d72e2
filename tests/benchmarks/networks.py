"""Networks of PyTorch whose training steps are timed, with the shapes of their batches.

Batch normalizations are folded, as they are in what is trained here.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Network:
    """A network to train, its batch and what share of PyTorch's time its step may take."""

    name: str
    build: Callable[[Any], Any]
    """From the torch module to a network."""
    shape: tuple[int, ...]
    bound: float | None = None

    def module(self) -> Any:
        """The network with the weights that it has in every process."""
        import torch  # pyright: ignore[reportMissingImports]

        torch.manual_seed(0)
        return self.build(torch).train()

    def batch(self) -> dict[str, np.ndarray]:
        """The samples `x` and their `labels`."""
        random = np.random.default_rng(0)
        x = random.standard_normal(self.shape).astype(np.float32)
        return {"x": x, "labels": random.integers(0, CLASSES, self.shape[0])}

    def exported(self) -> bytes:
        """The network as an ONNX model, with any batch."""
        import torch  # pyright: ignore[reportMissingImports]

        file, x = io.BytesIO(), torch.from_numpy(self.batch()["x"])
        options = {"input_names": ["x"], "output_names": ["y"], "opset_version": 18}
        options |= {"dynamic_axes": {"x": {0: "N"}, "y": {0: "N"}}, "dynamo": False}
        options |= {"do_constant_folding": False, "training": torch.onnx.TrainingMode.PRESERVE}
        torch.onnx.export(self.module(), (x,), file, **options)
        return file.getvalue()


def _tiny(torch: Any) -> Any:
    nn = torch.nn
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, CLASSES))


def _digits(torch: Any) -> Any:
    nn = torch.nn
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()),
        *(nn.MaxPool2d(2), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


def _residual(torch: Any, body: Any, shortcut: Any, after: Any) -> Any:
    class Residual(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.shortcut, self.after = body, shortcut, after

        def forward(self, x: Any) -> Any:
            return self.after(self.shortcut(x) + self.body(x))

    return Residual()


def _resnet20(torch: Any) -> Any:
    """Source: He et al., Deep Residual Learning (2015)."""
    nn = torch.nn
    layers, width = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU()], 16
    for out, blocks in ((16, 3), (32, 3), (64, 3)):
        for index in range(blocks):
            stride = 2 if index == 0 and out != width else 1
            body = nn.Sequential(
                *(nn.Conv2d(width, out, 3, stride, 1), nn.ReLU(), nn.Conv2d(out, out, 3, 1, 1)),
            )
            same = width == out
            shortcut = nn.Identity() if same else nn.Conv2d(width, out, 1, stride)
            layers.append(_residual(torch, body, shortcut, nn.ReLU()))
            width = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


_MOBILENET = (
    *((1, 8, 1, 1), (6, 8, 2, 2), (6, 16, 3, 2), (6, 24, 4, 2), (6, 32, 3, 1), (6, 56, 3, 2)),
    (6, 112, 1, 1),
)


def _mobilenet(torch: Any) -> Any:
    """MobileNetV2 of width 0.35; source: Sandler et al. (2018)."""
    nn = torch.nn
    layers, width = [nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU6()], 16
    for expansion, out, blocks, first in _MOBILENET:
        for index in range(blocks):
            stride, inner = (first if index == 0 else 1), width * expansion
            parts = [] if expansion == 1 else [nn.Conv2d(width, inner, 1), nn.ReLU6()]
            parts += [nn.Conv2d(inner, inner, 3, stride, 1, groups=inner), nn.ReLU6()]
            body = nn.Sequential(*parts, nn.Conv2d(inner, out, 1))
            if stride == 1 and width == out:
                body = _residual(torch, body, nn.Identity(), nn.Identity())
            layers.append(body)
            width = out
    layers += [nn.Conv2d(width, 1280, 1), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(1280, 10))


def _transformer(torch: Any) -> Any:
    """Two layers of MiniLM's size on embedded tokens (Wang et al., 2020)."""
    nn = torch.nn
    width, heads = 384, 12

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([nn.Linear(width, width) for _ in range(4)])

        def forward(self, x: Any) -> Any:
            q, k, v = (
                part(x).reshape(-1, x.shape[1], heads, width // heads).transpose(1, 2)
                for part in self.parts[:3]
            )
            scores = torch.softmax(q @ k.transpose(-1, -2) / (width // heads) ** 0.5, -1)
            return self.parts[3]((scores @ v).transpose(1, 2).reshape(-1, x.shape[1], width))

    class Last(nn.Module):
        def forward(self, x: Any) -> Any:
            return x.mean(1)

    layers = []
    for _ in range(2):
        feed = nn.Sequential(nn.Linear(width, 1536), nn.GELU(), nn.Linear(1536, width))
        for body in (Attention(), feed):
            layers.append(_residual(torch, body, nn.Identity(), nn.LayerNorm(width)))
    return nn.Sequential(*layers, Last(), nn.Linear(width, 10))


CLASSES = 10
TINY = Network("tiny", _tiny, (2, 1, 4, 4))
"""What a framework trains to be awake."""
NETWORKS = (
    Network("digits", _digits, (64, 1, 8, 8), 1.5),
    Network("resnet20", _resnet20, (32, 3, 32, 32), 1.2),
    Network("mobilenetv2_035", _mobilenet, (16, 3, 96, 96), 1.2),
    Network("minilm_layers", _transformer, (8, 128, 384), 0.85),
)
