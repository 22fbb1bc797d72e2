"""What arrays say of a model's task: its inputs, what its output is held against, how it is read.

Arrays come as people have them: a table for a model of one input, classes by any name, values
without an axis of their own. Training and sessions get them by name, in the model's dtypes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import onnx_ir as ir

from onnxcompress.contract import Array
from onnxcompress.data import Port, interface, open_data
from onnxcompress.data.ports import convert
from onnxcompress.errors import InputError
from onnxcompress.graph.inference import infer
from onnxcompress.graph.linear import is_op
from onnxcompress.train.lesson import before_softmax
from onnxcompress.train.losses import CrossEntropy, Loss, MeanSquared, learns_classes
from onnxcompress.train.samples import LABELS, TARGET, from_npz, open_samples


def read(
    source: Any, ports: Sequence[Port], where: str, *, finite: bool = True
) -> dict[str, Array]:
    """All samples by input name, in the model's dtypes, with `labels` where the source has some.

    Args:
        source: an array (or a list of numbers or a data frame) for a model of one input, whose
            rows are laid out as the input is where they are flat; arrays by name; or anything
            that `open_data` opens.
        finite: refuse NaN and infinity.

    Raises:
        InputError: if it does not suit the model; `where` opens the sentence.
    """
    if (stored := from_npz(source)) is not None:
        source = stored
    elif is_array(source):
        if len(ports) != 1:
            names = ", ".join(repr(port.name) for port in ports)
            raise InputError(f"{where} is one array but the model takes {names}: give a dict")
        source = {ports[0].name: _laid_out(_array(source, where), ports[0])}
    if isinstance(source, Mapping):
        given = cast("Mapping[str, Any]", source)
        extras = [LABELS] if LABELS in given else []
        source = {name: _plain(array) for name, array in given.items()}
    else:
        source = open_data(source, ports, finite=finite)
        extras = [] if source.labels is None else [LABELS]
    samples = open_samples(source, ports, extras, where=where)
    found = next(samples.stretches(max(1, samples.size)))
    return found | convert(found, ports, where, finite=finite)


def read_both(
    source: Any, student: ir.Model, teacher: ir.Model | None, where: str, *, finite: bool = True
) -> tuple[dict[str, Array], Array | None]:
    """The samples by input name of either model, and the source's own labels.

    An array is for both, by whatever names they take it. Raises like `read`.
    """
    groups = [interface(model) for model in (student, teacher) if model is not None]
    if not is_array(source):
        groups = [tuple({port.name: port for group in groups for port in group}.values())]
    found = dict[str, Array]()
    for ports in groups:
        found |= read(source, ports, where, finite=finite)
    taken = {port.name for ports in groups for port in ports}
    return found, None if LABELS in taken else found.pop(LABELS, None)


def is_array(source: Any) -> bool:
    """Whether it is one array, not several by name or a source of feeds."""
    if isinstance(source, list | tuple):
        return not any(isinstance(item, Mapping) for item in cast("Sequence[Any]", source)[:1])
    return hasattr(source, "__array__")


def _plain(array: Any) -> Any:
    """Lists as arrays; what tells its shape is left where it lies."""
    return array if hasattr(array, "shape") else np.asarray(array)


def _array(source: Any, where: str) -> Array:
    try:
        return np.asarray(source)
    except ValueError as error:
        raise InputError(f"{where} is not an array: {error}") from error


def _laid_out(array: Array, port: Port) -> Array:
    """Rows of a table in the shape that the model takes a sample in."""
    sizes = [] if port.shape is None else [n for n in port.shape[1:] if isinstance(n, int)]
    fits = port.shape is not None and len(sizes) == len(port.shape) - 1 > 1
    if array.ndim == 2 and fits and array.shape[1] == math.prod(sizes):
        return array.reshape(-1, *sizes)
    return array


@dataclass(frozen=True)
class Task:
    """What an output is held against, and how it is read afterwards."""

    output: str
    """Name of the model's output that is learned: its first one of floats."""
    classes: Array | None = None
    """What the scores along the last axis stand for; None where the output is values."""
    shares: str = ""
    """The operator that makes shares of scores already, if the graph has one: Softmax, ..."""
    flat: bool = False
    """Whether values had no last axis where the output has one, of size 1."""

    def labels(self, outputs: Array) -> Array:
        """The class of the highest score, or the values, in the form that they came in."""
        if self.classes is not None:
            return self.classes[outputs.argmax(-1)]
        return outputs[..., 0] if self.flat else outputs

    def probabilities(self, outputs: Array) -> Array:
        """Shares of 1 along the last axis: float32, of the outputs' shape."""
        if self.shares == "Softmax":
            return outputs
        powers = np.exp(outputs - outputs.max(-1, keepdims=True))
        return powers if self.shares == "LogSoftmax" else powers / powers.sum(-1, keepdims=True)


def learned_output(model: ir.Model) -> ir.Value:
    """The first output of floats.

    Raises:
        InputError: if there is none.
    """
    infer(model)
    for value in model.graph.outputs:
        if value.dtype is not None and value.dtype.is_floating_point():
            return value
    raise InputError("the model gives no floats, so nothing can be learned from what it gives")


def gives_scores(model: ir.Model) -> bool:
    """Whether the learned output has an axis of classes, as far as the graph tells."""
    return before_softmax(learned_output(model))[1]


def as_task(
    model: ir.Model, answers: Any, losses: Sequence[Loss] | None, classes: Sequence[Any] | None
) -> tuple[Task, dict[str, Array]]:
    """How the model's output is to be read, and the array that losses hold it against.

    Classes are learned where a loss says so (`CrossEntropy`); with none given, where answers are
    no floats and the output has an axis for them. Whole numbers that number the scores need no
    names, and a negative one is a sample without a label; other classes stand for the scores in
    the order of `classes`, or sorted.

    Raises:
        InputError: if the answers do not suit the output.
    """
    value = learned_output(model)
    scores = before_softmax(value)[1]
    name = value.name or ""
    found = np.asarray(answers)
    learn_classes = scores and found.dtype.kind != "f"
    if losses is not None:
        learn_classes = learns_classes(losses)
    if learn_classes:
        shape = [] if value.shape is None else list(value.shape)
        count = shape[-1] if shape and isinstance(shape[-1], int) else None
        labels, names = _encoded(found, classes, count)
        return Task(name, names, _shares(value)), {LABELS: labels}
    if found.dtype.kind not in "fiub":
        raise InputError(f"Y holds {found.dtype} but {name!r} gives no scores of classes: give it "
                         "numbers, or the model a head for classes")  # fmt: skip
    target = found.astype(np.float32)
    if not np.isfinite(target).all():
        raise InputError("Y holds NaN or infinity: clean the data")
    rank = None if value.shape is None else len(value.shape)
    flat = rank is not None and target.ndim == rank - 1
    return Task(name, None, "", flat), {TARGET: target[..., None] if flat else target}


def unlearned(model: ir.Model, classes: Sequence[Any] | None) -> Task:
    """How outputs are read where no answers were learned: as values, but for known `classes`."""
    if classes is None:
        return Task(model.graph.outputs[0].name or "")
    value = learned_output(model.clone())
    return Task(value.name or "", np.asarray(classes), _shares(value))


def _shares(value: ir.Value) -> str:
    """The Softmax or LogSoftmax that gives a value."""
    node = value.producer()
    while node is not None and node.op_type == "Identity" and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node.op_type if is_op(node, "Softmax", "LogSoftmax") and node is not None else ""


def default_losses(model: ir.Model, task: Task) -> tuple[Loss, ...]:
    """Cross-entropy of the scores before a Softmax, or the squared error of values."""
    value = learned_output(model)
    if task.classes is None:
        return (MeanSquared(task.output, TARGET),)
    return (CrossEntropy(before_softmax(value)[0].name or ""),)


def _encoded(labels: Array, names: Sequence[Any] | None, count: int | None) -> tuple[Array, Array]:
    """Labels as numbers of scores (soft ones as they are), and the classes by that number."""
    if labels.dtype.kind == "f":
        return labels.astype(np.float32), np.arange(count or labels.shape[-1])
    numbered = names is None or np.array_equal(names, np.arange(len(names)))
    if numbered and labels.dtype.kind in "iu" and labels.size:
        most = int(labels.max())
        if most < (count or most + 1):
            return labels.astype(np.int64), np.arange(count or most + 1)
    try:
        known = np.unique(labels) if names is None else np.asarray(names)
        order = np.argsort(known)
        place = np.searchsorted(known, labels, sorter=order)
    except TypeError as error:
        raise InputError(f"Y mixes kinds of classes: {error}") from error
    if count is not None and len(known) != count:
        raise InputError(
            f"there are {len(known)} classes but the model gives {count} scores: name all of them "
            "(classes=...), or give it another head (replace_head)"
        )
    numbers = order[place.clip(max=len(known) - 1)]
    if (wrong := known[numbers] != labels).any():
        raise InputError(f"Y holds {labels[wrong].flat[0]!r}, which is none of the classes")
    return numbers.astype(np.int64), known
