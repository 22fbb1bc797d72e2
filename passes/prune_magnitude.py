"""Magnitude pruning: set the smallest weights to zero, exactly as many as asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, ClassVar, Final, Literal

import onnx_ir as ir

from onnxcompress.contract import Figure, Pass, Result, Skip
from onnxcompress.errors import InputError
from onnxcompress.graph.scopes import nodes_within
from onnxcompress.numerics.layer_adaptive import layer_adaptive_counts
from onnxcompress.numerics.magnitudes import Cut, cut_below, cut_smallest, prune, pruned_blocks
from onnxcompress.operators import (
    TABLE,
    Role,
    constant_tensor,
    data_inputs,
    weight_inputs,
)

_LARGE: Final = 1 << 20  # bytes; what is larger is computed when it is read
_FLOATS: Final = frozenset(
    (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
)
_CONTRACTING: Final = tuple(op for op, row in TABLE.items() if row.role is Role.CONTRACT)


@dataclass(frozen=True, kw_only=True)
class PruneMagnitude(Pass):
    """Set the weights of smallest magnitude to zero.

    w' = 0 for round(n · sparsity) of all n weights, else w, which is not changed. Within a tensor
    the smallest go. How many go of each is for `scope` to say. Layer-adaptive (LAMP): those of
    least w² / Σ v² over all v of the tensor with |v| ≥ |w|, which no scaling of a layer alters, so
    that no layer is emptied because batchnorm was folded into it. Global: those of least |w|.
    Tensor: the same share of each. Accuracy on 100 to 150 images after pruning alone:

        sparsity 0.3    float   layer_adaptive   global   tensor
        photo_digits            0.885            0.851    0.860
        mobilenetv2             0.74             0.27     0.00
        tinydarknet             0.60             0.55     0.04

    Among equals the first go, so the count is met exactly; weights that are zero already count.
    With `threshold` instead, all |w| below it go.

    Zeros stay zeros in symmetric quantization, whose zero_point is 0, so prune first. A file with
    many zeros compresses better; ONNX Runtime's dense kernels are not faster for it.

    Pruned are the weights of convolutions, matrix products and recurrent operators, shared or
    not, as initializers or Constant nodes, in subgraphs and functions. Declined, each with a
    Skip: weights that the caller may override, that are computed or stored as integers, that
    something else reads too, that the model returns, or that have few elements.

    Idempotent. Sources: Han et al., Learning both Weights and Connections for Efficient Neural
    Networks, 2015; Lee et al., Layer-adaptive sparsity for the magnitude-based pruning, ICLR 2021.
    """

    name: ClassVar[str] = "prune_magnitude"

    sparsity: float | None = None
    """Share of weights that are zero afterwards, from 0 to 1; half where no option says."""
    threshold: float | None = None
    """Prune all magnitudes below this instead of a share."""
    scope: Literal["layer_adaptive", "global", "tensor"] = "layer_adaptive"
    """Rank all weights by their share of their tensor or by magnitude, or each tensor's alone."""
    include: tuple[str, ...] = _CONTRACTING
    """Nodes' names or operator types whose weights are pruned, or names of initializers."""
    exclude: tuple[str, ...] = ()
    """Nodes' names or operator types whose weights are kept, or names of initializers."""
    min_elements: int = 256
    """Smaller tensors are left alone."""

    def __post_init__(self) -> None:
        if self.sparsity is not None and self.threshold is not None:
            raise InputError("prune_magnitude takes sparsity or threshold, not both")
        if self.sparsity is not None and not 0 <= self.sparsity <= 1:
            raise InputError(f"sparsity {self.sparsity} is not a share from 0 to 1")
        if self.threshold is not None and not self.threshold >= 0:
            raise InputError(f"threshold {self.threshold} is not a magnitude: give 0 or more")

    def call(self, model: ir.Model) -> Result:
        skips: list[Skip] = []
        weights = self._weights(model, skips)
        cuts = self._cuts(list(weights.values()))
        for (weight, tensor), cut in zip(weights.items(), cuts, strict=True):
            if cut.changed:
                _put(weight, _pruned(weight, tensor, cut))
        modified = any(cut.changed for cut in cuts)
        return Result(model, modified, tuple(skips), _figures(weights, cuts))

    def _weights(self, model: ir.Model, skips: list[Skip]) -> dict[ir.Value, ir.TensorProtocol]:
        """The weights to prune, in graph order."""
        readers: dict[ir.Value, ir.Node] = {}
        for node in _nodes(model):
            for value in self._asked(node):
                readers.setdefault(value, node)
        weights: dict[ir.Value, ir.TensorProtocol] = {}
        for value, node in readers.items():
            tensor, reason = constant_tensor(value), self._refusal(value)
            if reason is not None or tensor is None:
                reason = reason or "it is computed or can be overridden"
                skips.append(Skip(value.name or node.name or "", node.op_type, reason))
            else:
                weights[value] = tensor
        return weights

    def _asked(self, node: ir.Node) -> list[ir.Value]:
        """The inputs of the node that `include` means."""
        named = [
            v
            for v in node.inputs
            if v is not None and _matches((v.name,), self.include) and constant_tensor(v)
        ]
        return [*named, *(_weights_of(node) if _matches(_names(node), self.include) else ())]

    def _refusal(self, value: ir.Value) -> str | None:
        users = [usage.node for usage in value.uses()]
        tensor = constant_tensor(value)
        if any(_matches((value.name, *_names(user)), self.exclude) for user in users):
            return "excluded by name or type"
        if _is_integer(value):
            return "it is stored as integers: prune before quantizing"
        if tensor is None:
            return None
        if tensor.dtype not in _FLOATS:
            return f"it is {tensor.dtype.name.lower()}"
        if tensor.size < max(1, self.min_elements):
            return f"it has fewer than {self.min_elements} elements"
        if value.is_graph_output():
            return "it is an output of the model"
        other = next((user for user in users if value not in self._asked(user)), None)
        return None if other is None else f"{other.op_type} {other.name!r} reads it too"

    def _cuts(self, tensors: Sequence[ir.TensorProtocol]) -> list[Cut]:
        if self.threshold is not None:
            return [cut_below(t, self.threshold, wide=_wide([t])) for t in tensors]
        share = 0.5 if self.sparsity is None else self.sparsity
        count, wide = round(sum(t.size for t in tensors) * share), _wide(tensors)
        if self.scope == "global":
            return cut_smallest(tensors, count, wide=wide)
        counts = [round(t.size * share) for t in tensors]
        if self.scope == "layer_adaptive":
            counts = layer_adaptive_counts(tensors, count, wide=wide)
        pairs = zip(tensors, counts, strict=True)
        return [cut for t, c in pairs for cut in cut_smallest([t], c, wide=_wide([t]))]


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    for graph in (model.graph, *model.functions.values()):
        yield from nodes_within(graph)


def _names(node: ir.Node) -> tuple[str | None, ...]:
    return node.name, node.op_type


def _matches(names: Sequence[str | None], patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name or "", pattern) for name in names for pattern in patterns)


def _weights_of(node: ir.Node) -> list[ir.Value]:
    """The constants that the node multiplies its data by, or looks up.

    Where none is constant: those that are weights all the same, not data (a product of two
    activations has none).
    """
    weights, data = weight_inputs(node), data_inputs(node)
    constants = [v for v in weights if constant_tensor(v) is not None]
    constants = constants or [v for v in data if constant_tensor(v) is not None]
    return constants or [v for v in weights if v not in data or _is_stored(v)]


def _is_stored(value: ir.Value) -> bool:
    return value.is_initializer() or _is_integer(value)


def _is_integer(value: ir.Value) -> bool:
    producer = value.producer()
    return producer is not None and producer.op_type == "DequantizeLinear"


def _wide(tensors: Sequence[ir.TensorProtocol]) -> bool:
    return any(t.dtype == ir.DataType.DOUBLE for t in tensors)


class _PrunedTensor(ir.LazyTensor):
    """A large tensor that is pruned when it is read, and piece by piece when it is written."""

    def __init__(self, source: ir.TensorProtocol, cut: Cut, name: str | None) -> None:
        shape = ir.Shape(source.shape.numpy())
        super().__init__(partial(_computed, source, cut, name), source.dtype, shape, name=name)
        self._source, self._cut = source, cut

    def tofile(self, file: Any) -> None:
        """Write the bytes to `file`, little-endian, without holding them all."""
        for block in pruned_blocks(self._source.numpy(), self._cut):
            file.write(block.astype(block.dtype.newbyteorder("<"), copy=False).tobytes())


def _pruned(weight: ir.Value, source: ir.TensorProtocol, cut: Cut) -> ir.TensorProtocol:
    make = _computed if source.nbytes <= _LARGE else _PrunedTensor
    return make(source, cut, weight.name)


def _computed(source: ir.TensorProtocol, cut: Cut, name: str | None) -> ir.TensorProtocol:
    return ir.Tensor(prune(source.numpy(), cut), source.dtype, name=name)


def _put(weight: ir.Value, tensor: ir.TensorProtocol) -> None:
    producer = weight.producer()
    if producer is None or weight.const_value is not None:
        weight.const_value = tensor
    if producer is not None:
        producer.attributes.clear()
        producer.attributes["value"] = ir.AttrTensor("value", tensor)


def _figures(
    weights: Mapping[ir.Value, ir.TensorProtocol], cuts: Sequence[Cut]
) -> dict[str, Figure]:
    """What was achieved, in all and by tensor."""
    sizes, zeros = [t.size for t in weights.values()], [cut.zeros for cut in cuts]
    figures: dict[str, Figure] = {"weights": sum(sizes), "zeros": sum(zeros)}
    if weights:
        figures["sparsity"] = sum(zeros) / sum(sizes)
    counted = zip(weights, zeros, sizes, strict=True)
    figures["sparsity by tensor"] = {w.name or "": count / size for w, count, size in counted}
    return figures
