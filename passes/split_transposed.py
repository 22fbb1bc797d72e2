"""Write transposed convolutions as convolutions, for which runtimes have integer kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np
import onnx_ir as ir

from onnxcompress.contract import Array, Pass, Result, Skip
from onnxcompress.graph.names import FreshNames
from onnxcompress.graph.rewriting import initializer
from onnxcompress.operators import DEFAULT_DOMAINS, constant, constant_tensor, int_attribute

_OPSET: Final = 11
_END: Final = np.iinfo(np.int64).max
_MOST_WASTE: Final = 1.8


@dataclass(frozen=True, kw_only=True)
class SplitTransposed(Pass):
    """Replace ConvTranspose of stride s by Conv and DepthToSpace, and a crop where it pads.

    ::

        x ─ ConvTranspose(W, s) ─ y      x ─ Conv(W') ─ DepthToSpace(s) ─ Slice ─ y

    Output s·q + r is Σ_m x[q - m] · W[r + m·s]: for each remainder r a plain convolution of
    ceil(k / s) taps, and DepthToSpace puts the s² remainders of a pixel side by side. Exact: the
    same products and sums, beside some with zeros where s does not divide k.

    Declines, with a line in the report: other than two spatial axes, groups, dilations, strides
    that differ, output_shape or auto_pad, an output_padding that reaches beyond the crop, weights
    that are computed, shared or not float32, and kernels that zeros would make much dearer.
    Goes into the main graph only. Idempotent.

    Source: Shi et al., Is the deconvolution layer the same as a convolutional layer?, 2016; ONNX
    ConvTranspose, DepthToSpace.
    """

    name: ClassVar[str] = "split_transposed"
    exact: ClassVar[bool] = True

    def call(self, model: ir.Model) -> Result:
        skips: list[Skip] = []
        fresh = FreshNames(model.graph)
        written = 0
        for node in list(model.graph):
            if node.op_type != "ConvTranspose" or node.domain not in DEFAULT_DOMAINS:
                continue
            reason = _refusal(node, model.graph.opset_imports.get("", 0))
            if reason is not None:
                skips.append(Skip(node.name or "", node.op_type, reason))
                continue
            _rewrite(model.graph, node, fresh)
            written += 1
        figures = {"transposed convolutions split": written}
        return Result(model, modified=bool(written), skips=tuple(skips), figures=figures)


def _ints(node: ir.Node, name: str, default: Sequence[int]) -> tuple[int, ...]:
    attribute = node.attributes.get(name)
    return tuple(default) if attribute is None else tuple(attribute.as_ints())


def _refusal(node: ir.Node, opset: int) -> str | None:
    weight = constant_tensor(node.inputs[1])
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if opset < _OPSET:
        return f"DepthToSpace orders channels as needed only from opset {_OPSET} on"
    if weight is None or (bias is not None and constant_tensor(bias) is None):
        return "its weight or bias is computed or can be overridden"
    if weight.dtype != ir.DataType.FLOAT or weight.shape.rank() != 4:
        return "its weight is not float32 over two spatial axes"
    kernel = weight.shape.numpy()[2:]
    strides = _ints(node, "strides", (1, 1))
    if int_attribute(node, "group", 1) != 1 or _ints(node, "dilations", (1, 1)) != (1, 1):
        return "it has groups or dilations"
    if strides[0] != strides[1] or "output_shape" in node.attributes:
        return "its strides differ or its output's shape is given"
    auto_pad = node.attributes.get("auto_pad")
    if auto_pad is not None and auto_pad.as_string() != "NOTSET":
        return "its padding is worked out when it runs"
    if any(right < 0 for right in _crop(node, kernel)[1]):
        return "its output_padding reaches beyond what is computed"
    taps = [-(-k // strides[0]) * strides[0] for k in kernel]
    if taps[0] * taps[1] > _MOST_WASTE * kernel[0] * kernel[1]:
        return "most of the split kernel would be zeros"
    return None


def _crop(node: ir.Node, kernel: Sequence[int]) -> tuple[list[int], list[int]]:
    """Rows and columns to cut off before and behind."""
    stride = _ints(node, "strides", (1, 1))[0]
    pads = _ints(node, "pads", (0, 0, 0, 0))
    extra = _ints(node, "output_padding", (0, 0))
    computed = [-(-k // stride) * stride for k in kernel]
    behind = [computed[i] - kernel[i] + pads[2 + i] - extra[i] for i in range(2)]
    return list(pads[:2]), behind


def split_weight(weight: Array, stride: int) -> Array:
    """Conv's weight (C_out·s², C_in, m, m') from ConvTranspose's (C_in, C_out, k, k')."""
    c_in, c_out, *kernel = weight.shape
    taps = [-(-k // stride) for k in kernel]
    padded = np.zeros((c_in, c_out, taps[0] * stride, taps[1] * stride), weight.dtype)
    padded[:, :, : kernel[0], : kernel[1]] = weight
    phases = padded.reshape(c_in, c_out, taps[0], stride, taps[1], stride)
    flipped = phases[:, :, ::-1, :, ::-1, :]
    split = flipped.transpose(1, 3, 5, 0, 2, 4)
    return np.ascontiguousarray(split).reshape(c_out * stride**2, c_in, *taps)


def _rewrite(graph: ir.Graph, node: ir.Node, fresh: FreshNames) -> None:
    weight, old = constant(node.inputs[1]), node.outputs[0]
    bias = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    assert weight is not None
    stride = _ints(node, "strides", (1, 1))[0]
    label = old.name or "output"

    def stored(part: str, array: Array) -> ir.Value:
        return initializer(graph, fresh(f"{label}_{part}"), array)

    split = split_weight(weight, stride)
    inputs = [node.inputs[0], stored("weight", split)]
    if bias is not None:
        inputs.append(stored("bias", np.repeat(bias, stride**2)))
    reach = [taps - 1 for taps in split.shape[2:]]
    attributes = {"pads": [*reach, *reach], "kernel_shape": list(split.shape[2:])}
    new = [ir.node("Conv", inputs, attributes, name=node.name)]
    if stride > 1:
        spread = {"blocksize": stride, "mode": "CRD"}
        new.append(ir.node("DepthToSpace", [new[-1].outputs[0]], spread))
    before, behind = _crop(node, weight.shape[2:])
    if any(before) or any(behind):
        ends = [-b if b else _END for b in behind]
        bounds = [np.array(v, np.int64) for v in (before, ends, [2, 3])]
        parts = [stored(f"crop_{i}", bound) for i, bound in enumerate(bounds)]
        new.append(ir.node("Slice", [new[-1].outputs[0], *parts]))
    for inner in new[:-1]:
        inner.outputs[0].name = fresh(f"{label}_{inner.op_type}")
        inner.outputs[0].type = old.type
    result = new[-1].outputs[0]
    result.name, result.type, result.shape = old.name, old.type, old.shape
    graph.insert_before(node, new)
    old.replace_all_uses_with(result, replace_graph_outputs=True)
    graph.remove(node, safe=True)
