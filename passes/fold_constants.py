"""Compute once, here, what ONNX Runtime would compute to the same values on every start."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Final

import numpy as np
import onnx_ir as ir

from onnxcompress.contract import Array, Pass, Result, Skip
from onnxcompress.graph.evaluate import EVALUATED, Tensors, Undecided, evaluation
from onnxcompress.graph.scopes import Declared, nodes_within, subgraphs
from onnxcompress.operators import DEFAULT_DOMAINS, constant_tensor

_LARGE: Final = 1 << 20
_DEEPEST: Final = 4
_DEPTH: Final = "onnxcompress.evaluations"
"""How many evaluations reading a tensor takes, in its `meta`."""
_QUANTIZERS: Final = frozenset({"DequantizeLinear", "DynamicQuantizeLinear", "QuantizeLinear"})


@dataclass(frozen=True, kw_only=True)
class FoldConstants(Pass):
    """Replace nodes whose inputs are all constant by their value.

    ```
    shape ─ Cast ─ Concat ┐                   shape' ┐
    x ────────────────────┴ Reshape    ⇒    x ───────┴ Reshape
    ```
    Constant are: initializers that the caller cannot override, Constant nodes, what has been
    folded, and Shape and Size of a value whose declared shape is static and can be relied on. A
    value becomes an initializer; it stays a Constant node where it is a graph output, within a
    function, or in a model of IR version 3, whose initializers would have to be inputs.

    Goes into subgraphs and functions. A large result is computed again whenever it is read, so
    that it is not held in memory.

    Declined, each with a Skip: quantizers (a dequantized weight would be float again), random
    and unknown operators, control flow, types that the runtime rounds in its own way, integer
    division by zero, casts out of range, whatever cannot be evaluated, and growth beyond
    `max_bytes`; a second run finds more to do only if that budget was used up.
    """

    name: ClassVar[str] = "fold_constants"
    exact: ClassVar[bool] = True

    max_bytes: int = 4 << 20
    """How many bytes the model may gain by values that are larger than what they come from."""

    def call(self, model: ir.Model) -> Result:
        folding = _Folding(model, self.max_bytes)
        folding.visit(model.graph, model.graph.opset_imports, as_node=(model.ir_version or 4) < 4)
        for function in model.functions.values():
            folding.visit(function, function.opset_imports, as_node=True)
        return Result(
            model,
            modified=folding.folded > 0,
            skips=tuple(folding.skips),
            figures={"folded": folding.folded, "bytes_gained": folding.gained},
        )


@dataclass
class _Folding:
    """One run over one model."""

    model: ir.Model
    max_bytes: int
    gained: int = 0
    folded: int = 0
    skips: list[Skip] = field(default_factory=list[Skip])
    uses: Counter[ir.Value] = field(default_factory=Counter[ir.Value])
    """Uses left of each value: `Value.uses` copies them, which is quadratic for shared values."""
    folds: dict[ir.Value, bool] = field(default_factory=dict[ir.Value, bool])
    """Whether all readers of a value can be expected to fold, as they stand at the first."""
    going: set[ir.Value] = field(default_factory=set[ir.Value])
    """Constants whose bytes have been counted as gone."""

    def __post_init__(self) -> None:
        self.declared = Declared(self.model)
        for graph in (self.model.graph, *self.model.functions.values()):
            for node in nodes_within(graph):
                self.uses.update(v for v in node.inputs if v is not None)

    def visit(
        self, graph: ir.Graph | ir.Function, opsets: Mapping[str, int], *, as_node: bool
    ) -> None:
        """Fold what can be folded in `graph` and below it, in one walk."""
        dropped: list[ir.Node] = []
        for node in graph:
            for subgraph in subgraphs(node):
                self.visit(subgraph, opsets, as_node=as_node)
            stays = as_node or any(v.is_graph_output() for v in node.outputs)
            inputs = self._inputs(node)
            done = stays and _is_constant(node) and "value" in node.attributes
            if inputs is None or done or not node.outputs:
                continue
            try:
                if stays and len(node.outputs) != 1:
                    raise Undecided("has several outputs, which one Constant node cannot have")
                results = self._results(node, inputs, opsets.get("", 1))
                if stays:
                    self._become_constant(node, results)
                else:
                    self._become_initializers(node, results)
                    dropped.append(node)
                self.folded += 1
            except Undecided as why:
                where = node.name or str(node.outputs[0].name)
                self.skips.append(Skip(where, node.op_type, str(why)))
        graph.remove(dropped)

    def _inputs(self, node: ir.Node) -> Tensors | None:
        """The node's inputs if all are constant. Where only a shape counts, it is all there is."""
        if node.op_type in {"Shape", "Size"} and len(node.inputs) == 1:
            shape = None if node.inputs[0] is None else self.declared.shape(node.inputs[0])
            if shape is None or not shape.is_static():
                return None
            return [ir.Tensor(np.broadcast_to(np.uint8(0), shape.numpy()))]
        tensors = [constant_tensor(v) for v in node.inputs]
        known = all(t is not None or v is None for t, v in zip(tensors, node.inputs, strict=True))
        return tensors if known else None

    def _results(self, node: ir.Node, inputs: Tensors, version: int) -> list[ir.TensorProtocol]:
        if _is_constant(node):
            return [_constant_value(node)]
        if node.op_identifier() in self.model.functions:
            raise Undecided("is a function of the model")
        if node.op_type in _QUANTIZERS:
            raise Undecided("quantizes: its float value would be larger")
        evaluate = evaluation(node, inputs, version, self.max_bytes)
        arrays = evaluate()
        self._charge(node, sum(a.nbytes for a in arrays))
        return [_tensor(evaluate, i, array, inputs) for i, array in enumerate(arrays)]

    def _charge(self, node: ir.Node, nbytes: int) -> None:
        """Charge the growth to the budget: what the outputs add less the inputs that go."""
        here = Counter(v for v in node.inputs if v is not None)
        going = [v for v, n in here.items() if v not in self.going and self._goes(v, n)]
        growth = nbytes - sum(t.nbytes for v in going if (t := constant_tensor(v)) is not None)
        if growth > 0 and self.gained + growth > self.max_bytes:
            raise Undecided(f"would add {growth} bytes to the model (max_bytes={self.max_bytes})")
        self.gained += growth
        self.going.update(going)

    def _goes(self, value: ir.Value, uses: int) -> bool:
        """Whether `value` will be gone when its readers are folded; `uses` are of this one."""
        if value.is_graph_output() or value.is_graph_input():
            return False
        if self.uses[value] == uses:
            return True
        if value not in self.folds:
            self.folds[value] = all(
                use.node.op_type in EVALUATED and self._inputs(use.node) is not None
                for use in value.uses()
            )
        return self.folds[value]

    def _become_initializers(self, node: ir.Node, results: Sequence[ir.TensorProtocol]) -> None:
        graph = node.graph
        assert graph is not None
        pairs = zip(node.outputs, results, strict=True)
        live = [(value, tensor) for value, tensor in pairs if self.uses[value]]
        if any(value.name in graph.initializers for value, _ in live):
            raise Undecided("an initializer already has the name of its output")
        for value, tensor in live:
            initializer = ir.Value(
                name=value.name,
                type=ir.TensorType(tensor.dtype),
                shape=ir.Shape(tensor.shape.numpy()),
                const_value=tensor,
            )
            graph.register_initializer(initializer)
            value.replace_all_uses_with(initializer)
            self.uses[initializer] = self.uses.pop(value)
        self._detach(node)

    def _become_constant(self, node: ir.Node, results: Sequence[ir.TensorProtocol]) -> None:
        """The node stays, as a Constant: nothing that refers to its output notices."""
        self._detach(node)
        node.op_type = "Constant"
        node.attributes.clear()
        node.attributes.add(ir.AttrTensor("value", results[0]))

    def _detach(self, node: ir.Node) -> None:
        """Take the node's inputs away, and from the model the initializers that only it used."""
        inputs = [v for v in node.inputs if v is not None]
        node.resize_inputs(0)
        self.uses.subtract(inputs)
        for value in inputs:
            owner = value.graph
            if self.uses[value] or value.is_graph_output() or value.is_graph_input():
                continue
            if value.is_initializer() and owner is not None:
                owner.initializers.pop(value.name or "", None)


def _is_constant(node: ir.Node) -> bool:
    return node.op_type == "Constant" and node.domain in DEFAULT_DOMAINS


def _constant_value(node: ir.Node) -> ir.TensorProtocol:
    try:
        tensor = ir.convenience.get_const_tensor(node.outputs[0])
    except ValueError as error:
        raise Undecided(str(error)) from error
    if tensor is None:
        raise Undecided("has an attribute that the function's caller sets")
    return tensor


def _tensor(
    evaluate: Callable[[], list[Array]], index: int, array: Array, inputs: Tensors
) -> ir.TensorProtocol:
    """The result as a tensor: a large one is evaluated when it is read, so that none is held.

    At the end of a long chain of such tensors it is held, so that the work stays linear.
    """
    if array.nbytes <= _LARGE:
        return ir.Tensor(array if array.base is None else array.copy())
    tensor = ir.Tensor(array)
    depth = 1 + max((t.meta.get(_DEPTH, 0) for t in inputs if t is not None), default=0)
    if depth > _DEEPEST:
        return tensor
    lazy = ir.LazyTensor(
        lambda: ir.Tensor(evaluate()[index]), dtype=tensor.dtype, shape=ir.Shape(array.shape)
    )
    lazy.meta[_DEPTH] = depth
    return lazy
