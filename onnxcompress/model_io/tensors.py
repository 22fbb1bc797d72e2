"""The tensors of a model: where they stand, and whether their data is what they declare."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from onnxcompress.contract import Array
from onnxcompress.errors import InputError
from onnxcompress.graph.scopes import scopes
from onnxcompress.model_io.mapped import MappedFile, MappedTensor

Tensor = ir.TensorProtocol
Put = Callable[[Tensor], None]

_TENSORS = (ir.AttributeType.TENSOR, ir.AttributeType.TENSORS)
_DENSE_LIMIT = 1 << 31  # bytes of a sparse tensor's dense form
_REMEMBERED = 1 << 10  # bytes of an array up to which it is kept
_SPARSE = "onnxcompress:sparse:"


def slots(model: ir.Model) -> Iterator[tuple[Tensor, Put]]:
    """Every tensor of the model with the means to put another in its place.

    Initializers and tensor attributes, in subgraphs and functions too.
    """
    functions = list(model.functions.values())
    for scope in chain.from_iterable(map(scopes, (model.graph, *functions))):
        if isinstance(scope, ir.Graph):
            for value in scope.initializers.values():
                if value.const_value is not None:
                    yield value.const_value, _put_value(value)
        yield from _attribute_slots(scope)


def _attribute_slots(nodes: ir.Graph | ir.Function) -> Iterator[tuple[Tensor, Put]]:
    for node in nodes:
        for attribute in tuple(node.attributes.data.values()):
            if attribute.type not in _TENSORS or attribute.is_ref():
                continue
            if attribute.type == ir.AttributeType.TENSOR:
                yield attribute.as_tensor(), _put_attribute(node, attribute)
            else:
                for index, tensor in enumerate(attribute.as_tensors()):
                    yield tensor, _put_element(node, attribute.name, index)


def _put_value(value: ir.Value) -> Put:
    def put(tensor: Tensor) -> None:
        value.const_value = tensor

    return put


def _put_attribute(node: ir.Node, attribute: ir.Attr) -> Put:
    def put(tensor: Tensor) -> None:
        node.attributes[attribute.name] = ir.AttrTensor(
            attribute.name, tensor, doc_string=attribute.doc_string
        )

    return put


def _put_element(node: ir.Node, name: str, index: int) -> Put:
    def put(tensor: Tensor) -> None:
        elements = list(node.attributes[name].as_tensors())
        elements[index] = tensor
        node.attributes[name] = ir.AttrTensors(name, elements)

    return put


def contained(model: Path, location: str) -> Path:
    """The path of a model's data file.

    Raises:
        InputError: if it is not below the folder of the model (where a link leads to the model,
            of the model or of the link).
    """
    relative = Path(location)
    outside = not location or relative.is_absolute() or ".." in relative.parts
    path = model.parent / relative
    homes = (model.parent.resolve(), model.resolve().parent)
    if outside or not any(path.resolve().is_relative_to(home) for home in homes):
        raise InputError(
            f"{model} refers to data at {location!r}, which is not in its folder: put the file "
            "beside the model and save the model again with that location"
        )
    return path


class Source:
    """Where the tensors of one model file have their data."""

    def __init__(
        self, model: Path, file: MappedFile | None, sparse: Mapping[str, onnx.SparseTensorProto]
    ) -> None:
        self._model = model
        self._files = {} if file is None else {model.name: file}
        self._sparse = sparse

    def resolve(self, tensor: Tensor) -> Tensor:
        """The tensor with its data behind it, mapped where it lies in a file.

        Raises:
            InputError: if the data is missing or not as large as dims and dtype say.
        """
        try:
            if isinstance(tensor, ir.ExternalTensor):
                sparse = self._sparse.get(tensor.path)
                return self._dense(sparse) if sparse else self._map(tensor)
            if type(tensor) is ir.TensorProtoTensor:
                tensor = _Remembering(tensor.raw)
            _check_size(tensor)
        except (ValueError, KeyError) as error:
            raise InputError(
                f"{self._model}: tensor {tensor.name or ''!r} {error.args[0]}: "
                "the file is damaged, export or copy it again"
            ) from error
        return tensor

    def _map(self, tensor: ir.ExternalTensor) -> MappedTensor:
        file = self._file(tensor.path)  # no base_dir is set: it is the location
        if tensor.dtype in (ir.DataType.STRING, ir.DataType.UNDEFINED):
            raise ValueError(f"is external but of type {tensor.dtype.name}")
        size, offset = _nbytes(tensor), tensor.offset or 0
        if tensor.length not in (None, size):
            raise ValueError(f"has {tensor.length} bytes where its dims need {size}")
        if offset + size > file.size:
            raise ValueError(
                f"ends at byte {offset + size} of {file.path}, which has {file.size} bytes"
            )
        mapped = MappedTensor(file, offset, tensor.dtype, tensor.shape, tensor.name)
        mapped.doc_string = tensor.doc_string
        mapped.metadata_props.update(tensor.metadata_props)
        return mapped

    def _file(self, location: str) -> MappedFile:
        if location not in self._files:
            path = contained(self._model, location)
            try:
                self._files[location] = MappedFile(path)
            except (OSError, ValueError) as error:
                reason = error.strerror if isinstance(error, OSError) else error
                raise InputError(
                    f"{self._model} needs its data file {path}, which cannot be read "
                    f"({str(reason).lower()}): put it beside the model"
                ) from error
        return self._files[location]

    def _dense(self, sparse: onnx.SparseTensorProto) -> ir.LazyTensor:
        values = self.resolve(ir.from_proto(sparse.values))
        indices = self.resolve(ir.from_proto(sparse.indices))
        shape = tuple(sparse.dims)
        size = math.prod(shape)
        if min(shape, default=0) < 0 or size * values.dtype.itemsize > _DENSE_LIMIT:
            raise ValueError(f"is sparse with dims {list(shape)}, more than 2 GiB when dense")
        flat = _flat_indices(indices, values.size, shape)

        def dense() -> Tensor:
            array = np.zeros(size, values.dtype.numpy())
            array[flat] = values.numpy()
            return ir.Tensor(array.reshape(shape), values.dtype)

        return ir.LazyTensor(dense, values.dtype, ir.Shape(shape), name=sparse.values.name)


def _flat_indices(indices: Tensor, count: int, shape: Sequence[int]) -> Array:
    array = indices.numpy()
    if array.dtype != np.int64 or array.shape not in ((count,), (count, len(shape))):
        raise ValueError(f"is sparse with {count} values and indices of shape {array.shape}")
    if array.ndim == 2:
        return np.asarray(np.ravel_multi_index(tuple(array.T), tuple(shape)))
    if count and not 0 <= array.min() <= array.max() < math.prod(shape):
        raise ValueError("is sparse with an index beyond its dims")
    return array


def take_sparse(graph: onnx.GraphProto) -> dict[str, onnx.SparseTensorProto]:
    """Put a reference in the place of each sparse initializer and constant, which onnx_ir lacks.

    Returns:
        the sparse tensors by the location that now stands for them.
    """
    taken: dict[str, onnx.SparseTensorProto] = {}

    def stand_in(sparse: onnx.SparseTensorProto) -> onnx.TensorProto:
        location = f"{_SPARSE}{len(taken)}"
        taken[location] = sparse
        tensor = onnx.TensorProto(
            name=sparse.values.name, data_type=sparse.values.data_type, dims=sparse.dims
        )
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)
        return tensor

    def visit(graph: onnx.GraphProto) -> None:
        graph.initializer.extend(map(stand_in, graph.sparse_initializer))
        del graph.sparse_initializer[:]
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.name == "sparse_value" and node.op_type == "Constant":
                    attribute.t.CopyFrom(stand_in(attribute.sparse_tensor))
                    attribute.ClearField("sparse_tensor")
                    attribute.name, attribute.type = "value", onnx.AttributeProto.TENSOR
                elif attribute.type == onnx.AttributeProto.GRAPH:
                    visit(attribute.g)
                elif attribute.type == onnx.AttributeProto.GRAPHS:
                    for inner in attribute.graphs:
                        visit(inner)

    visit(graph)
    return taken


def _nbytes(tensor: Tensor) -> int:
    dims = tensor.shape.numpy()
    if min(dims, default=0) < 0:
        raise ValueError(f"has dims {list(dims)}")
    return math.ceil(math.prod(dims) * tensor.dtype.itemsize)


def _check_size(tensor: Tensor) -> None:
    if isinstance(tensor, ir.StringTensor):
        have, need = len(tensor.string_data()), math.prod(tensor.shape.numpy())
    elif isinstance(tensor, ir.TensorProtoTensor):
        have, need = _proto_sizes(tensor)
    else:
        return
    if have != need:
        raise ValueError(f"has {have} values or bytes where its dims need {need}")


class _Remembering(ir.TensorProtoTensor):
    """A tensor of the protocol buffer that makes its shape, type and small array once.

    Passes ask for them dozens of times, and onnx_ir's own makes them anew each time.
    """

    __slots__ = ("_array", "_dtype", "_shape")

    def __init__(self, proto: onnx.TensorProto) -> None:
        super().__init__(proto)
        self._shape, self._dtype = super().shape, super().dtype
        self._array: Array | None = None

    @property
    def shape(self) -> ir.Shape:
        return self._shape

    @property
    def dtype(self) -> ir.DataType:
        return self._dtype

    def numpy(self) -> Array:
        if self._array is not None:
            return self._array
        array = super().numpy()
        if array.nbytes <= _REMEMBERED:
            array.flags.writeable = False
            self._array = array
        return array


def _proto_sizes(tensor: ir.TensorProtoTensor) -> tuple[int, int]:
    """What a tensor in the protocol buffer has and needs, of bytes or of its field's elements."""
    proto, dtype = tensor.raw, tensor.dtype
    if dtype == ir.DataType.UNDEFINED:
        raise ValueError("has no type")
    need = _nbytes(tensor)
    if proto.HasField("raw_data"):
        return len(proto.raw_data), need
    have = len(getattr(proto, onnx.helper.tensor_dtype_to_field(proto.data_type)))
    if dtype.bitwidth in (2, 4):  # packed, one byte an element
        return have, need
    parts = 2 if dtype in (ir.DataType.COMPLEX64, ir.DataType.COMPLEX128) else 1
    return have, tensor.size * parts
