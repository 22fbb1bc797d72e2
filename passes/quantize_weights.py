"""Weight-only quantization: constants in 4 or 8 bits by blocks, activations in float."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Final, Literal

import numpy as np
import onnx_ir as ir

from onnxcompress import targets
from onnxcompress.contract import Pass, Result, Skip
from onnxcompress.errors import InputError
from onnxcompress.graph.block_weights import BlockStore, BlockWeight
from onnxcompress.graph.placement import matches
from onnxcompress.graph.quantized_weights import WeightStore
from onnxcompress.graph.rewriting import become
from onnxcompress.graph.scopes import nodes_within
from onnxcompress.operators import (
    DEFAULT_DOMAINS,
    Role,
    constant_tensor,
    float_attribute,
    int_attribute,
    operator,
    weight_inputs,
)

_CONTRIB: Final = "com.microsoft"
_LEAST_BLOCK: Final = 16
_WIDEST_BLOCK: Final = 128
"""Blocks of a whole row are stored as blocks of this size, the largest that is fast."""
_BIAS: Final = 5
"""Index of MatMulNBits' bias."""
_BLOCKS_OPSET: Final = 21
_CHANNELS_OPSET: Final = 13
_MATRIX: Final = "MatMulNBits"
_TABLE: Final = "GatherBlockQuantized"
_PLAIN: Final = "DequantizeLinear"


@dataclass(frozen=True, kw_only=True)
class QuantizeWeights(Pass):
    """Quantize weights to 4 or 8 bits by blocks and compute in float: smaller, without any data.

    A matrix product before and after, on a target that has the kernel::

        x ─ MatMul(W) ─ y        x ─ MatMulNBits(codes, scales) ─ y

    w = (code - zero_point) · scale, with one scale (and zero_point, where not symmetric) for each
    `block_size` values that one output sums over, from the range of least squared error
    (`numerics.blocks`).

    - MatMul by a constant matrix, and Gemm, become com.microsoft.MatMulNBits.
    - A table that Gather reads row by row becomes com.microsoft.GatherBlockQuantized.
    - Whatever the target has no such kernel for (stacks of matrices, Conv, LSTM, GRU, RNN) gets
      its weight from a DequantizeLinear, with blocks from opset 21 on.

    Goes into bodies of If, Loop and Scan. A weight with several readers is stored once for each
    form that they need. Declines, each with a Skip: functions (inline them first), weights that
    are computed, small, not float32, not finite or that the caller may override, transposed
    convolutions (split them first), whatever `include` and `exclude` say.

    Idempotent. Memory holds scales and one weight; codes are made when they are written.

    Source: contrib operators MatMulNBits and GatherBlockQuantized of ONNX Runtime; ONNX
    DequantizeLinear 21; Frantar et al., GPTQ, 2022, and Dettmers and Zettlemoyer, The case for
    4-bit precision: k-bit Inference Scaling Laws, 2023, on blocks.
    """

    name: ClassVar[str] = "quantize_weights"

    target: str = "cpu"
    """Runtime whose kernels are aimed at."""
    bits: Literal[4, 8] = 4
    """Bits of a weight."""
    block_size: int = 32
    """Values that share a scale, a power of 2 of at least 16; 0 gives each channel one scale."""
    symmetric: bool = True
    """Without zero points, which take another 4 or 8 bits a block."""
    accuracy_level: Literal[0, 1, 4] = 4
    """What MatMulNBits multiplies in: 1 float32, 4 int8 (activations rounded block by block)."""
    embeddings: bool = True
    """Also tables of embeddings."""
    min_elements: int = 4096
    """Smaller weights stay in float: they are no part of the size."""
    include: tuple[str, ...] = ("*",)
    """Node names or operator types to quantize; * and ? match."""
    exclude: tuple[str, ...] = ()
    """Node names or operator types to leave in float; * and ? match."""

    def __post_init__(self) -> None:
        size = self.block_size
        if size and (size < _LEAST_BLOCK or size & (size - 1)):
            raise InputError(
                f"block_size {size} is neither 0 nor a power of 2 of at least {_LEAST_BLOCK}"
            )

    def call(self, model: ir.Model) -> Result:
        skips: list[Skip] = []
        sites = [site for n in _nodes(model.graph) for site in self._sites(n, model, skips)]
        for function in model.functions.values():
            skips += [_skip(n, "it is in a function: inline functions") for n in _nodes(function)]
        if not sites:
            return Result(model, modified=False, skips=tuple(skips))
        rewrite = _Rewrite(self, model.graph)
        for node, index in sites:
            rewrite.apply(node, index)
        rewrite.store.drop_unused()
        if not rewrite.forms.keys().isdisjoint((_MATRIX, _TABLE)):
            model.graph.opset_imports.setdefault(_CONTRIB, 1)
        return Result(model, modified=True, skips=tuple(skips), figures=rewrite.forms)

    def _sites(
        self, node: ir.Node, model: ir.Model, skips: list[Skip]
    ) -> Iterator[tuple[ir.Node, int]]:
        """The node with the index of each input that is to be quantized."""
        for index in _constants(node):
            tensor = constant_tensor(node.inputs[index])
            if node.op_type == "Gather" and not (self.embeddings and _is_table(node, tensor)):
                continue
            if not matches(node, self.include):
                continue
            reason = self._refusal(node, index, tensor, model.graph.opset_imports.get("", 0))
            if reason is None:
                yield node, index
            else:
                skips.append(_skip(node, reason))

    def _refusal(
        self, node: ir.Node, index: int, tensor: ir.TensorProtocol | None, opset: int
    ) -> str | None:
        if matches(node, self.exclude):
            return "excluded by name or type"
        if node.op_type == "ConvTranspose":
            return "its weight holds output channels on two axes: split transposed convolutions"
        if tensor is None:
            return "its weight is computed or can be overridden"
        if tensor.dtype != ir.DataType.FLOAT:
            return f"its weight is {tensor.dtype.name.lower()}, not float32"
        if tensor.size < max(1, self.min_elements) or tensor.shape.rank() < 2:
            return f"fewer than {self.min_elements} weights, or no matrix"
        if self.form(node, index, tensor) == _PLAIN:
            least = _CHANNELS_OPSET if self.by_channel(node, tensor) else _BLOCKS_OPSET
            if opset < least:
                return f"DequantizeLinear as it is needed comes with opset {least}: raise the opset"
        array = tensor.numpy()
        finite = np.isfinite(array.min()) and np.isfinite(array.max())
        return None if finite else "its weight holds NaN or infinity"

    def form(self, node: ir.Node, index: int, tensor: ir.TensorProtocol) -> str:
        """The operator that takes the codes of an input of `node`."""
        kernels = targets.load(self.target).weight_only
        if node.op_type == "Gather":
            whole_bytes = tensor.shape.numpy()[-1] * self.bits % 8 == 0
            fits = tensor.shape.rank() == 2 and whole_bytes
            return _TABLE if fits and _TABLE in kernels else _PLAIN
        product = node.op_type in ("MatMul", "Gemm") and index == 1 and tensor.shape.rank() == 2
        return _MATRIX if product and _MATRIX in kernels else _PLAIN

    def by_channel(self, node: ir.Node, tensor: ir.TensorProtocol) -> bool:
        """Whether a DequantizeLinear without blocks will do."""
        matrix = node.op_type == "Conv" or tensor.shape.rank() == 2
        return self.bits == 8 and not self.block_size and matrix


class _Rewrite:
    """One application to a model."""

    def __init__(self, options: QuantizeWeights, graph: ir.Graph) -> None:
        self.options = options
        self.store = WeightStore(graph, targets.load(options.target))
        self.blocks = BlockStore(self.store, options.bits, options.block_size, options.symmetric)
        self.forms: Counter[str] = Counter()

    def apply(self, node: ir.Node, index: int) -> None:
        weight = BlockWeight.of(node, index)
        form = self.options.form(node, index, weight.tensor)
        self.forms[form] += 1
        if form == _MATRIX:
            self._product(node, weight)
        elif form == _TABLE:
            self._lookup(node, weight)
        else:
            by_channel = self.options.by_channel(node, weight.tensor)
            node.replace_input_with(index, self.blocks.restored(weight, by_channel=by_channel))

    def _product(self, node: ir.Node, weight: BlockWeight) -> None:
        size, beta = self.options.block_size or _WIDEST_BLOCK, float_attribute(node, "beta", 1.0)
        parts = self.blocks.packed(
            weight, size, padded=True, factor=float_attribute(node, "alpha", 1.0)
        )
        data = node.inputs[0]
        assert data is not None
        if node.op_type == "Gemm" and int_attribute(node, "transA", 0):
            data = self.store.before(node, "Transpose", [data], {"perm": [1, 0]})
        inputs = [data, *parts]
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is not None and beta == 1 and _is_vector(bias, weight.shape[0]):
            inputs = [*inputs, *[None] * (_BIAS - len(inputs)), bias]
            bias = None
        attributes = {"N": weight.shape[0], "K": weight.shape[1], "block_size": size}
        attributes |= {"bits": self.options.bits, "accuracy_level": self.options.accuracy_level}
        if bias is None:
            become(node, _MATRIX, inputs, _integers(attributes), domain=_CONTRIB)
            return
        product = self.store.before(node, _MATRIX, inputs, attributes, domain=_CONTRIB)
        product.shape = node.outputs[0].shape
        become(node, "Add", [product, self.store.scaled_bias(node, bias)])

    def _lookup(self, node: ir.Node, weight: BlockWeight) -> None:
        row = 1 << max(4, (weight.shape[-1] - 1).bit_length())
        size = self.options.block_size or row
        codes, *parameters = self.blocks.packed(weight, size, padded=False)
        attributes = {"gather_axis": 0, "quantize_axis": 1, "block_size": size}
        attributes["bits"] = self.options.bits
        inputs = [codes, node.inputs[1], *parameters]
        become(node, _TABLE, inputs, _integers(attributes), domain=_CONTRIB)


def _nodes(graph: ir.Graph | ir.Function) -> Iterator[ir.Node]:
    """The nodes of the graph and its subgraphs that have a weight."""
    for node in nodes_within(graph):
        if node.domain in DEFAULT_DOMAINS and (node.op_type == "Gather" or weight_inputs(node)):
            yield node


def _constants(node: ir.Node) -> list[int]:
    """The inputs that hold weights, of those that there are."""
    if node.op_type == "Gather":
        return [0]
    row = operator(node)
    if row.role is not Role.CONTRACT:
        return []
    if node.op_type == "MatMul" and constant_tensor(node.inputs[1]) is None:
        return [0] if constant_tensor(node.inputs[0]) is not None else [1]
    indices = (row.weight, row.recurrent)
    return [i for i in indices if i is not None and i < len(node.inputs) and node.inputs[i]]


def _is_table(node: ir.Node, tensor: ir.TensorProtocol | None) -> bool:
    """Whether the node reads rows of a table of numbers, not a shape or an index."""
    if tensor is None or not tensor.dtype.is_floating_point() or tensor.shape.rank() < 2:
        return False
    return int_attribute(node, "axis", 0) in (0, -tensor.shape.rank())


def _is_vector(value: ir.Value, size: int) -> bool:
    tensor = constant_tensor(value)
    return tensor is not None and tuple(tensor.shape.numpy()) == (size,)


def _integers(attributes: Mapping[str, int]) -> dict[str, ir.Attr]:
    return {name: ir.AttrInt64(name, value) for name, value in attributes.items()}


def _skip(node: ir.Node, reason: str) -> Skip:
    return Skip(node.name or "", node.op_type, reason)
