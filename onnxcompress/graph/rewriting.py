"""Small changes to a graph: a node that becomes another, one before it, a constant more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from onnxcompress.contract import Array


def become(
    node: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, ir.Attr] | None = None,
    *,
    domain: str = "",
) -> None:
    """Make `node` another operator; its outputs stay what they are."""
    node.op_type, node.domain, node.version = op_type, domain, None
    node.resize_inputs(len(inputs))
    for index, value in enumerate(inputs):
        node.replace_input_with(index, value)
    node.attributes.clear()
    node.attributes.update(attributes or {})


def insert(
    node: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    name: str,
    attributes: Mapping[str, int | Sequence[int]] | None = None,
    dtype: ir.DataType = ir.DataType.FLOAT,
    *,
    domain: str = "",
) -> ir.Value:
    """The output, called `name` as is the node, of a new node before `node`."""
    new = ir.node(op_type, inputs, attributes, domain=domain, name=name)
    output = new.outputs[0]
    output.name, output.type = name, ir.TensorType(dtype)
    assert node.graph is not None
    node.graph.insert_before(node, new)
    return output


def initializer(graph: ir.Graph, name: str, array: Array) -> ir.Value:
    """A new initializer of the graph, which has no value of this name yet."""
    value = ir.val(name, const_value=ir.tensor(array, name=name))
    graph.register_initializer(value)
    return value
