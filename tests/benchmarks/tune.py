"""What tuning gives back of what rounding weights to few bits lost, on inputs without labels.

The teacher is the float model itself. Three seeds each, which draw the order of the samples; all
is scored on evaluation data that nothing saw. Training inputs come from the packages that the
models' own scripts take them from, the extra `train`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

import numpy as np
import onnx_ir as ir

from onnxcompress import api, schemes
from onnxcompress.contract import Array
from onnxcompress.graph.names import FreshNames
from onnxcompress.graph.rewriting import initializer, insert
from onnxcompress.operators import constant, weight_inputs
from onnxcompress.passes.raise_opset import RaiseOpset
from onnxcompress.pipeline import run
from onnxcompress.train.tune import tune
from tests.benchmarks import distillation
from tests.benchmarks.cases import Setting
from tests.benchmarks.distillation import TASKS, Task
from tests.benchmarks.table import Goal, goals, table

_MOST: Final = 1.0
"""Points that may be lost."""
_EPOCHS: Final = {"segment_tabular": 30, "vowel_lstm": 30, "name_language": 5, "photo_digits": 8}
_LARGEST_BITS: Final = 7
"""Largest code of 4 bits."""


def tables(setting: Setting) -> Iterator[str]:
    """Scores in percent by model and grid."""
    chosen = [t for t in TASKS if not setting.only or t.name in setting.only]
    seeds = 1 if setting.quick else distillation.SEEDS
    held: list[Goal] = []
    header = ("model", "weights", "float", "rounded", "tuned", "points lost by rounding", "tuned")
    yield from table(header, (row for t in chosen for row in _rows(t, seeds, setting.quick, held)))
    yield from goals(held)


def _rows(task: Task, seeds: int, quick: bool, held: list[Goal]) -> Iterator[list[str]]:
    floats, evaluation = distillation.model_of(task)
    best = distillation.score(floats, evaluation)
    try:
        drawn = [task.samples(seed)[0] for seed in range(seeds)]
    except ImportError as error:
        yield [task.name, f"needs the extra train ({error.name})", *5 * ["-"]]
        return
    for name, rounded in _GRIDS.items():
        if name == "2 bits by 32" and task.name == "vowel_lstm":
            continue  # ONNX Runtime 1.32 gives other numbers at each run where K is no whole block
        model = rounded(floats)
        before = distillation.score(model, evaluation)
        found: list[float] = []
        for seed, samples in enumerate(drawn):
            inputs = {n: a for n, a in samples.items() if n != "labels"}
            tuned = tune(
                model,
                inputs,
                teacher=floats,
                epochs=1 if quick else _EPOCHS[task.name],
                batch_size=task.batch,
                seed=seed,
            )
            found.append(distillation.score(tuned.model, evaluation))
        lost = 100 * (best - float(np.mean(found)))
        held.append(Goal(what=f"{task.name}: lost at {name} when tuned", figure=lost, bound=_MOST,
                         unit="points"))  # fmt: skip
        shown = [*map(distillation.percent, (best, before)), distillation.spread(np.array(found))]
        yield [task.name, name, *shown, f"{100 * (best - before):.1f}", f"{lost:.1f}"]


def _by_tensor(floats: ir.Model) -> ir.Model:
    """Plain rounding to 4 bits: one scale a tensor, from its largest magnitude."""
    model = run(floats, (*schemes.exact(), RaiseOpset(minimum=21))).model
    fresh, first = FreshNames(model.graph), model.graph[0]
    weights = {v: None for node in model.graph for v in weight_inputs(node) if v.is_initializer()}
    for value in weights:
        array = constant(value)
        if array is None or array.ndim < 2:
            continue
        scale = np.asarray(np.abs(array).max() / _LARGEST_BITS, np.float32)
        names = (fresh(f"{value.name}_{part}") for part in ("quantized", "scale", "restored"))
        codes, step, restored = names
        inputs = [initializer(model.graph, codes, _rounded(array, scale)),
                  initializer(model.graph, step, scale)]  # fmt: skip
        value.replace_all_uses_with(insert(first, "DequantizeLinear", inputs, restored))
    return model


def _rounded(array: Array, scale: Array) -> Array:
    return np.rint(array / scale).astype(ir.DataType.INT4.numpy())


def _by_channel(floats: ir.Model) -> ir.Model:
    """As `quantize --scheme weights --block-size 0` does: ranges of least squared error."""
    return api.quantize(floats, scheme="weights", min_elements=0, block_size=0, target="qnn").model


def _two_bits(floats: ir.Model) -> ir.Model:
    """Four levels, a scale for each 32 weights."""
    model = api.quantize(
        floats, scheme="weights", min_elements=0, bits=2, block_size=32, target="qnn"
    ).model
    model.graph.opset_imports[""] = 25  # which has the type; its operators are those of 24
    return model


_GRIDS: Final[dict[str, Callable[[ir.Model], ir.Model]]] = {
    "4 bits, a scale a tensor": _by_tensor,
    "4 bits, a scale a channel": _by_channel,
    "2 bits by 32": _two_bits,
}
