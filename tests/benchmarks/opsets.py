"""Raising the opset: ours beside onnx's converter, judged by ONNX Runtime.

    python -m tests.benchmarks.opsets

Every model of onnx's node tests from version 7 to 20, and the cases of our own tests whose
operators changed, are converted to 21; "other" means that outputs differ from the original's or
that the converted model does not run, with ONNX Runtime's optimizations off on both sides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
from onnx.backend.test.case.node import collect_testcases
from onnx.version_converter import convert_version

from tests.passes.test_raise_opset import CASES, X, convert, parse, run

TARGET = 21
Case = tuple[onnx.ModelProto, dict[str, Any]]


def ours(model: onnx.ModelProto) -> onnx.ModelProto | None:
    converted, result = convert(model, TARGET)
    return converted if result.modified else None


def onnxs(model: onnx.ModelProto) -> onnx.ModelProto | None:
    try:
        return convert_version(model, TARGET)
    except Exception:  # its ways of declining are of many types
        return None


def node_tests() -> Iterator[Case]:
    for case in collect_testcases(None):
        if case.model is not None and case.data_sets:
            names = [value.name for value in case.model.graph.input]
            yield case.model, dict(zip(names, case.data_sets[0][0], strict=False))


def changed_operators() -> Iterator[Case]:
    for opset, nodes in CASES.values():
        yield parse(nodes, opset), {"x": X}


def same(was: Any, now: Any) -> bool:
    if not isinstance(was, np.ndarray) or was.dtype.kind not in "fiub":
        return str(was) == str(now)
    return was.shape == now.shape and np.allclose(was, now, rtol=1e-5, atol=1e-6, equal_nan=True)


def judge(case: Case, converter: Callable[[onnx.ModelProto], onnx.ModelProto | None]) -> str:
    model, feed = case
    opset = {o.domain: o.version for o in model.opset_import}.get("", 0)
    if not 7 <= opset < TARGET:
        return ""
    try:
        expected = run(model, feed)
    except Exception:  # ONNX Runtime does not run all of them
        return ""
    converted = converter(model)
    if converted is None:
        return "declined"
    try:
        outputs = run(converted, feed)
    except Exception:
        return "other"
    return "exact" if all(map(same, expected, outputs)) else "other"


def main() -> None:
    print("| models | converter | exact | declined | other |\n| --- | --- | ---: | ---: | ---: |")
    for title, cases in (
        ("node tests", list(node_tests())),
        ("changed", list(changed_operators())),
    ):
        for converter in (ours, onnxs):
            counts = Counter(judge(case, converter) for case in cases)
            row = [counts[key] for key in ("exact", "declined", "other")]
            print(f"| {title} | {converter.__name__} | {' | '.join(map(str, row))} |", flush=True)


if __name__ == "__main__":
    main()
