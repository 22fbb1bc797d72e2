"""The exact passes against every test model that the onnx wheel ships.

The wheel builds its node models by importing their modules, which alone takes seconds: a plain
test run takes every eighth module, all small models that lie in files, and every fourth whole
network. With ONNXCOMPRESS_CORPUS=all in the environment, as `make bench` sets it, nothing is left
out.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.backend.test.case.node as node_tests
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import numpy_helper
from onnx.backend.test.loader import DATA_DIR

from onnxcompress.contract import Result
from onnxcompress.passes import EXACT

ort: Any = onnxruntime
Feed = dict[str, Any]

_STRIDE = 1 if os.environ.get("ONNXCOMPRESS_CORPUS") == "all" else 8
_RANDOM = frozenset(
    ("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform")
) | {"RandomUniformLike"}


@dataclass
class Case:
    """A model and what to feed it."""

    name: str
    model: onnx.ModelProto
    feeds: list[Feed]


def node_cases() -> Iterator[Case]:
    modules = sorted(m.name for m in pkgutil.iter_modules(node_tests.__path__))[::_STRIDE]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in modules:
            importlib.import_module(f"{node_tests.__name__}.{module}")
    for test in sorted(node_tests._NodeTestCases, key=lambda t: t.name):
        names = [v.name for v in test.model.graph.input]
        yield Case(test.name, test.model, [_feed(names, inputs) for inputs, _ in test.data_sets])


def frozen_cases() -> Iterator[Case]:
    """Node models whose inputs are constants: all that can be folded is."""
    for case in node_cases():
        model = onnx.ModelProto()
        model.CopyFrom(case.model)
        model.ir_version = max(model.ir_version, 4)
        feed = case.feeds[0]
        free = [v for v in model.graph.input if not _is_plain(feed.get(v.name), v)]
        given = {v.name: feed[v.name] for v in model.graph.input if v not in free}
        model.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in given.items())
        del model.graph.input[:]
        model.graph.input.extend(free)
        rest = {v.name: feed[v.name] for v in free if v.name in feed}
        yield Case(f"frozen {case.name}", model, [rest])


def file_cases() -> Iterator[Case]:
    for path in sorted(Path(DATA_DIR).glob("*/*/model.onnx")):
        model = onnx.load(path)
        names = [v.name for v in model.graph.input]
        sets = sorted(path.parent.glob("test_data_set_*"))
        feeds = [_feed(names, [_read(p) for p in _ordered(folder)]) for folder in sets]
        yield Case(f"{path.parent.parent.name}/{path.parent.name}", model, feeds)


def light_cases() -> Iterator[Case]:
    """Whole networks whose weights come from ConstantOfShape nodes."""
    for path in sorted(Path(DATA_DIR).glob("light/*.onnx"))[:: min(_STRIDE, 4)]:
        model = onnx.load(path)
        weights = {w.name for w in model.graph.initializer}
        [data] = [v for v in model.graph.input if v.name not in weights]
        shape = [d.dim_value for d in data.type.tensor_type.shape.dim]
        array = np.random.default_rng(0).standard_normal(shape, np.float32)
        yield Case(path.stem, model, [{data.name: array}])


def _ordered(folder: Path) -> list[Path]:
    return sorted(folder.glob("input_*.pb"), key=lambda p: int(p.stem.split("_")[1]))


def _read(path: Path) -> Any:
    return numpy_helper.to_array(onnx.load_tensor(str(path)))


def _feed(names: list[str], inputs: Any) -> Feed:
    return {name: value for name, value in zip(names, inputs, strict=False) if value is not None}


def _is_plain(value: Any, info: onnx.ValueInfoProto) -> bool:
    """Whether a fed value is an array that an initializer can hold."""
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "biuf":
        return False
    given = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
    return given == info.type.tensor_type.elem_type


@pytest.mark.parametrize("cases", [node_cases, frozen_cases, file_cases, light_cases])
def test_nothing_changes(cases: Callable[[], Iterator[Case]]) -> None:
    failures: list[str] = []
    ran = changed = 0
    for case in cases():
        try:
            modified, was_run = _check(case)
        except Exception as error:  # every model is tried, whatever becomes of one
            failures.append(f"{case.name}: {type(error).__name__}: {str(error)[:200]}")
        else:
            ran += was_run
            changed += modified
    assert not failures
    assert ran and changed


def _check(case: Case) -> tuple[bool, bool]:
    """Whether the passes changed the model, and whether it runs at all."""
    valid = _is_valid(case.model)
    outputs = _outputs(case.model, case.feeds)
    model = ir.from_proto(case.model)
    modified = False
    for pass_ in EXACT:
        result = pass_()(model)
        assert isinstance(result, Result)
        modified |= result.modified
    after = ir.to_proto(model)
    assert list(after.graph.input) == _inputs(case.model)
    assert list(after.graph.output) == list(case.model.graph.output)
    assert _opsets(after) == _opsets(case.model)
    assert not valid or _is_valid(after)
    if outputs is None:
        return modified, False
    again = _outputs(after, case.feeds)
    assert again is not None, "it does not run any more"
    if not any(n.op_type in _RANDOM for n in ir.traversal.RecursiveGraphIterator(model.graph)):
        _assert_same(outputs, again)
    return modified, True


def _inputs(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """What a caller feeds: IR version 3 also lists the initializers, which nobody can."""
    given = {w.name for w in model.graph.initializer} if model.ir_version < 4 else set[str]()
    return [value for value in model.graph.input if value.name not in given]


def _opsets(model: onnx.ModelProto) -> dict[str, int]:
    return {opset.domain: opset.version for opset in model.opset_import}


def _is_valid(model: onnx.ModelProto) -> bool:
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError:
        return False
    return True


def _outputs(model: onnx.ModelProto, feeds: list[Feed]) -> list[Any] | None:
    """Outputs for each feed, ONNX Runtime's own optimizations off; None if it cannot run it."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    quiet = ort.RunOptions()
    quiet.log_severity_level = 4
    try:
        session = ort.InferenceSession(model.SerializeToString(), options)
        return [session.run(None, feed, quiet) for feed in feeds]
    except Exception:  # what the runtime refuses, it refuses in many ways
        return None


def _assert_same(expected: Any, actual: Any) -> None:
    if isinstance(expected, list):
        assert len(expected) == len(actual)
        for e, a in zip(expected, actual, strict=True):
            _assert_same(e, a)
    elif isinstance(expected, np.ndarray) and expected.dtype.kind in "fc":
        assert expected.dtype == actual.dtype and expected.shape == actual.shape
        scale = np.abs(expected[np.isfinite(expected)]).max(initial=0)
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5 * float(scale))
    else:
        np.testing.assert_array_equal(actual, expected)
