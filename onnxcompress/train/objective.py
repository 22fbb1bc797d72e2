"""The graphs of a training step: what is made small, its gradients, and the update of weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import onnx_ir as ir

from onnxcompress.errors import InputError
from onnxcompress.graph.inference import infer
from onnxcompress.graph.scopes import sources, values_of
from onnxcompress.passes.raise_opset import RaiseOpset
from onnxcompress.train.batch_statistics import use_batch
from onnxcompress.train.gelu import join_gelu
from onnxcompress.train.gradients import LEAST_OPSET, add_gradients
from onnxcompress.train.losses import Loss, Terms
from onnxcompress.train.optimizers import Optimizer
from onnxcompress.train.tape import Tape

LOSS: Final = "loss"
"""The figure that is made small, in a step's figures and a history's."""


@dataclass(frozen=True)
class Objective:
    """A student with its losses behind it and its weights as inputs."""

    model: ir.Model
    loss: str
    """Name of the value that is made small, a float32 scalar."""
    terms: Mapping[str, str]
    """Names of the losses' own values by what they are called in figures; none for one loss."""
    hits: tuple[tuple[str, str], ...]
    """Names of the counts of labels that were met, and of labels."""
    targets: Mapping[str, ir.Value] = field(repr=False)
    """What was added to the student's inputs."""
    classes: Mapping[str, int]
    """How many classes labels are of, by the labels' name, where that is known."""

    @property
    def scalars(self) -> list[str]:
        """All values that a run gives beside gradients."""
        return [self.loss, *self.terms.values(), *(name for pair in self.hits for name in pair)]


def objective(model: ir.Model, losses: Sequence[Loss], trainable: Sequence[str]) -> Objective:
    """`losses` behind a clone of `model`, whose `trainable` initializers become inputs.

    Raises:
        InputError: if there are no losses, or one reads what the model does not have.
    """
    if not losses:
        raise InputError("training needs at least one loss")
    copy = _prepared(model)
    for name in trainable:
        _make_input(copy.graph, name)
    tape = Tape(copy.graph)
    terms = Terms(tape)
    found = [loss.emit(terms) for loss in losses]
    weighted = [terms.times(v, loss.weight) for v, loss in zip(found, losses, strict=True)]
    total = tape.op("Sum", weighted) if len(weighted) > 1 else weighted[0]
    _infer(copy)
    return Objective(
        model=copy,
        loss=total.name or "",
        terms=_titles(losses, found) if len(losses) > 1 else {},
        hits=tuple((a.name or "", b.name or "") for a, b in terms.hits),
        targets=terms.targets,
        classes=terms.classes,
    )


def weights_read(model: ir.Model, losses: Sequence[Loss]) -> set[str]:
    """Names of the initializers that the losses depend on."""
    found = objective(model, losses, [])
    graph = found.model.graph
    read = sources(v for node in graph for v in node.outputs if v.name == found.loss)
    return {name for name, value in graph.initializers.items() if value in read}


def _prepared(model: ir.Model) -> ir.Model:
    copy = model.clone()
    if (version := copy.graph.opset_imports.get("", LEAST_OPSET)) < LEAST_OPSET:
        skips = RaiseOpset(minimum=LEAST_OPSET).call(copy).skips
        if skips:
            raise InputError(
                f"training needs operators of version {LEAST_OPSET}, and those of this model, of "
                f"version {version}, cannot be converted: {skips[0].op} {skips[0].node!r}: "
                f"{skips[0].reason}"
            )
    _infer(copy)
    return copy


def _infer(model: ir.Model) -> None:
    _, failure = infer(model)
    if failure:
        raise InputError(f"training needs the shapes of the model's values, but {failure}")


def _make_input(graph: ir.Graph, name: str) -> None:
    value = graph.initializers.pop(name)
    tensor = value.const_value
    assert tensor is not None
    value.type, value.shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape.numpy())
    value.const_value = None
    if value not in graph.inputs:
        graph.inputs.append(value)


def _titles(losses: Sequence[Loss], values: Sequence[ir.Value]) -> dict[str, str]:
    """Names of the losses' values by the losses' types, with a number where there are several."""
    titles: dict[str, str] = {}
    for loss, value in zip(losses, values, strict=True):
        kind = type(loss).__name__
        count = sum(title.split(" ")[0] == kind for title in titles)
        titles[f"{kind} {count + 1}" if count else kind] = value.name or ""
    return titles


def with_gradients(
    found: Objective,
    trainable: Sequence[str],
    kept: Collection[str] = (),
    *,
    samples: int | None = None,
    block: int | None = None,
) -> tuple[ir.Model, dict[str, str]]:
    """The objective's model with its backward pass, and names of the gradients by weight.

    Args:
        kept: statistics whose batch normalizations normalize with the batch's, whose names stand
            beside the gradients.
        samples: in a batch; None: any number.
        block: channels in a block, as `add_gradients` takes it.

    Raises:
        InputError: if a gradient cannot be had, or a weight has no effect on the loss.
    """
    copy = found.model.clone()
    if samples is not None:
        _fix_samples(copy, {*trainable, *kept}, samples)
    join_gelu(copy.graph)
    statistics = use_batch(copy.graph, kept)
    values = {v.name: v for v in values_of(copy.graph)}
    wrt = [values[name] for name in trainable]
    gradients = add_gradients(copy.graph, values[found.loss], wrt, block)
    idle = [v.name for v in wrt if v not in gradients]
    if idle:
        more = f" and {len(idle) - 1} more" if len(idle) > 1 else ""
        raise InputError(f"{idle[0]!r}{more} has no effect on the loss: leave it out of trainable")
    tape, names = Tape(copy.graph), dict[str, str]()
    for value, gradient in gradients.items():
        if gradient.name in names.values() or gradient.producer() is None:
            gradient = tape.op("Identity", [gradient])  # an output is an output once
        names[value.name or ""] = gradient.name or ""
    return copy, names | statistics


def _fix_samples(model: ir.Model, weights: Collection[str], samples: int) -> None:
    """Let the first axis of what a batch holds have this size."""
    graph = model.graph
    batch = [v for v in graph.inputs if v.name not in weights and not v.is_initializer()]
    firsts = {_symbol(v.shape[0]) for v in batch if v.shape is not None and len(v.shape)}
    for value in (*batch, *graph.outputs):
        if value.shape is not None:
            named = [samples if _symbol(d) in firsts - {None} else d for d in value.shape]
            value.shape = ir.Shape(named)
    _infer(model)


def _symbol(dim: int | ir.SymbolicDim) -> str | None:
    return None if isinstance(dim, int) else dim.value


@dataclass(frozen=True)
class Update:
    """The graph that makes new weights of old ones and gradients, along one flat axis."""

    model: ir.Model
    inputs: Mapping[str, str]
    """Names of inputs: `weight`, `gradient`, the states, and scalars."""
    outputs: Mapping[str, str]
    """Names of outputs: `weight` and the states."""


def update(optimizer: Optimizer, *, clipped: bool) -> Update:
    """The optimizer's graph; with `clipped`, the scalar `clip` multiplies the gradient first."""
    scalars = [*optimizer.coefficients(optimizer.lr, 1, True), *(["clip"] if clipped else [])]
    vectors = ["weight", "gradient", *optimizer.states]
    graph = _graph({**dict.fromkeys(vectors, ("n",)), **dict.fromkeys(scalars, ())})
    inputs = {v.name or "": v for v in graph.inputs}
    tape = Tape(graph)
    gradient = inputs["gradient"]
    if clipped:
        gradient = tape.op("Mul", [gradient, inputs["clip"]])
    states = {name: inputs[name] for name in optimizer.states}
    weight, new = optimizer.emit(tape, inputs["weight"], gradient, states, inputs)
    outputs = {"weight": weight, **new}
    graph.outputs.extend(outputs.values())
    return Update(
        ir.Model(graph, ir_version=10),
        {name: name for name in inputs},
        {name: value.name or "" for name, value in outputs.items()},
    )


def squares() -> ir.Model:
    """The graph that sums the squares of `gradient` [n]."""
    graph = _graph({"gradient": ("n",)})
    found = Tape(graph).op("ReduceSumSquare", list(graph.inputs), {"keepdims": 0})
    found.name = "squares"
    found.type, found.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(())
    graph.outputs.append(found)
    return ir.Model(graph, ir_version=10)


def _graph(inputs: Mapping[str, Sequence[str]]) -> ir.Graph:
    values = [
        ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))
        for name, shape in inputs.items()
    ]
    return ir.Graph(values, [], nodes=[], opset_imports={"": LEAST_OPSET}, name="update")
