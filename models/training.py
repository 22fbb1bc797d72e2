"""What the training scripts share: arithmetic that repeats, and graphs as exporters write them.

A rerun gives the same bytes because every step is pinned (one thread, kernels without CPU
dispatch, seeded draws from numpy) and because what cannot be pinned, the last bit of an `exp` of
another C library, has no effect: training runs in double precision, far from its noise, and the
weights are then rounded to a grid that is far coarser.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

# Read once, when torch loads its kernels, so they come before the import.
os.environ.setdefault("ATEN_CPU_CAPABILITY", "default")
os.environ.setdefault("MKL_CBWR", "COMPATIBLE")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper, numpy_helper

torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
torch.backends.mkldnn.set_flags(False)
torch.use_deterministic_algorithms(True)
torch.manual_seed(0)

GRID = 2.0**-16
"""Spacing of stored weights: fine beside any weight that matters, coarse beside rounding noise."""


def fit(
    parameters: Iterable[torch.nn.Parameter],
    loss_of: Callable[[np.ndarray], torch.Tensor],
    samples: int,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float = 1e-2,
) -> None:
    """AdamW with a short linear warm-up and a cosine decay; `loss_of` gets sample indices."""
    steps = epochs * (samples // batch_size)
    optimizer = torch.optim.AdamW(parameters, learning_rate, weight_decay=weight_decay, eps=1e-6)
    warm_up = steps // 20
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.05, total_iters=warm_up),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - warm_up),
        ],
        [warm_up],
    )
    rng = np.random.default_rng(1)
    for epoch in range(epochs):
        order, total = rng.permutation(samples), 0.0
        for start in range(0, samples - batch_size + 1, batch_size):
            loss = loss_of(order[start : start + batch_size])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch + 1}/{epochs}: loss {total / (samples // batch_size):.4f}", flush=True)


class Graph:
    """An ONNX graph under construction; an output is named after its node, as torch.onnx does."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}

    def node(
        self, op: str, inputs: list[str], name: str, output: str = "", **attributes: Any
    ) -> str:
        output = output or f"{name}_output_0"
        self.nodes.append(helper.make_node(op, inputs, [output], name, **attributes))
        return output

    def weight(self, name: str, value: torch.Tensor) -> str:
        """A trained float32 initializer, rounded to the grid."""
        settled = np.round(value.detach().numpy() / GRID) * GRID + 0.0  # no negative zero
        return self.constant(name, np.ascontiguousarray(settled, np.float32))

    def constant(self, name: str, value: np.ndarray) -> str:
        self.initializers[name] = numpy_helper.from_array(value, name)
        return name

    def linear(self, x: str, layer: torch.nn.Linear, scope: str) -> str:
        """`Gemm` over rows, as a framework writes a linear layer of a 2-D tensor."""
        module = scope.strip("/").replace("/", ".")
        weights = [self.weight(f"{module}.{n}", p) for n, p in layer.named_parameters()]
        return self.node("Gemm", [x, *weights], f"{scope}/Gemm", transB=1)

    def save(
        self,
        path: Path,
        inputs: dict[str, tuple[int, list[int | str]]],
        outputs: dict[str, list[int | str]],
        *,
        opset: int,
        ir_version: int,
    ) -> None:
        """Check and write the model; `inputs` maps a name to its TensorProto type and shape."""
        graph = helper.make_graph(
            self.nodes,
            path.parent.name,
            [helper.make_tensor_value_info(n, t, s) for n, (t, s) in inputs.items()],
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in outputs.items()],
            list(self.initializers.values()),
        )
        model = helper.make_model(
            graph,
            producer_name="onnxcompress.models",
            ir_version=ir_version,
            opset_imports=[helper.make_opsetid("", opset)],
        )
        onnx.checker.check_model(model, full_check=True)
        path.write_bytes(model.SerializeToString(deterministic=True))


def save_data(
    folder: Path, calibration: dict[str, np.ndarray], evaluation: dict[str, np.ndarray]
) -> None:
    """Write both feeds beside the model, named after its inputs; `labels` only to judge by."""
    np.savez_compressed(folder / "calibration.npz", **calibration)
    np.savez_compressed(folder / "evaluation.npz", **evaluation)


def record_score(folder: Path) -> None:
    """Run the written model in ONNX Runtime on the written evaluation data; keep what it scores."""
    with np.load(folder / "evaluation.npz") as data:
        feeds = dict(data)
    labels = feeds.pop("labels")
    session = ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, feeds)
    correct = int((np.asarray(logits).argmax(axis=1) == labels).sum())
    score = f'metric = "accuracy"\naccuracy = {correct / len(labels):.4f}\n'
    (folder / "score.toml").write_text(f"{score}correct = {correct}\nsamples = {len(labels)}\n")
    print(f"{folder.name}: {correct} of {len(labels)} right ({correct / len(labels):.2%})")
