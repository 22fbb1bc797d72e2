"""A training step beside PyTorch's, in turns.

Forward, loss, backward and SGD with momentum, on the same model and batch. PyTorch is needed for
the comparison alone: without it there is nothing to say.
"""

from __future__ import annotations

import importlib.util
import io
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx import load_model_from_string

from onnxcompress.train.losses import CrossEntropy
from onnxcompress.train.optimizers import SGD
from onnxcompress.train.parameters import trainable_weights
from onnxcompress.train.step import Step
from tests.benchmarks.cases import Setting
from tests.benchmarks.table import Goal, goals, table

_LR = 1e-3
_ROUNDS = 15


@dataclass(frozen=True)
class Case:
    """A network, its batch and the ratio that is wanted."""

    name: str
    build: Callable[[Any], Any]
    """From the torch module to a network."""
    shape: tuple[int, ...]
    classes: int
    bound: float


def tables(setting: Setting) -> Iterator[str]:
    """Milliseconds of a step, the best of those taken in turns, and what was wanted."""
    if importlib.util.find_spec("torch") is None:
        yield "PyTorch is not installed: there is nothing to compare with."
        yield ""
        return
    import torch  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(2)
    found: list[Goal] = []
    rows: list[list[str]] = []
    for case in CASES:
        if not setting.only or case.name in setting.only:
            ours, theirs = _measure(torch, case, 1 if setting.quick else _ROUNDS)
            rows.append([case.name, f"{ours:.1f}", f"{theirs:.1f}", f"{ours / theirs:.2f}"])
            what = f"{case.name}, share of PyTorch's time"
            found.append(Goal(what=what, figure=ours / theirs, bound=case.bound))
    yield from table(("model", "ours, ms", "PyTorch, ms", "ratio"), rows)
    yield from goals(found)


def _measure(torch: Any, case: Case, rounds: int) -> tuple[float, float]:
    torch.manual_seed(0)
    net = case.build(torch).train()
    random = np.random.default_rng(0)
    x = random.standard_normal(case.shape).astype(np.float32)
    labels = random.integers(0, case.classes, case.shape[0])
    steps = [_ours(torch, net, x, labels), _theirs(torch, net, x, labels)]
    best = [float("inf")] * 2
    for _ in range(rounds):
        for index, step in enumerate(steps):
            for warm in (False, True):
                begin = time.perf_counter()
                step()
                if warm:
                    best[index] = min(best[index], time.perf_counter() - begin)
    return best[0] * 1e3, best[1] * 1e3


def _ours(torch: Any, net: Any, x: Any, labels: Any) -> Callable[[], object]:
    step = Step(
        model := exported(torch, net, x),
        [CrossEntropy("y")],
        SGD(lr=_LR),
        trainable=trainable_weights(model, ["*"]),
        threads=2,
    )
    return lambda: step.run({"x": x, "labels": labels})


def exported(torch: Any, net: Any, x: Any) -> ir.Model:
    """The network as an ONNX model, with any batch."""
    file = io.BytesIO()
    options = {"input_names": ["x"], "output_names": ["y"], "opset_version": 18}
    options |= {"dynamic_axes": {"x": {0: "N"}, "y": {0: "N"}}, "dynamo": False}
    torch.onnx.export(
        net, (torch.from_numpy(x),), file, training=torch.onnx.TrainingMode.PRESERVE, **options
    )
    return ir.from_proto(load_model_from_string(file.getvalue()))


def _theirs(torch: Any, net: Any, x: Any, labels: Any) -> Callable[[], object]:
    optimizer = torch.optim.SGD(net.parameters(), lr=_LR, momentum=0.9)
    data, target = torch.from_numpy(x), torch.from_numpy(labels)

    def step() -> float:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(net(data), target)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


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
    """Batch normalizations folded, as they are in what is trained here (He et al., 2015)."""
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
    """MobileNetV2 of width 0.35, batch normalizations folded (Sandler et al., 2018)."""
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


CASES = (
    Case("digits", _digits, (64, 1, 8, 8), 10, 1.5),
    Case("resnet20", _resnet20, (32, 3, 32, 32), 10, 1.2),
    Case("mobilenetv2_035", _mobilenet, (16, 3, 96, 96), 10, 1.2),
    Case("minilm_layers", _transformer, (8, 128, 384), 10, 0.85),
)
