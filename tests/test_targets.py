"""Targets as data: what their files may say, and what the verbs make of a runtime elsewhere."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxcompress import api, targets
from onnxcompress.cli import main
from onnxcompress.errors import GateError, InputError
from onnxcompress.gates import Gate
from onnxcompress.inspection import Inspection, inspect
from onnxcompress.job import compress
from onnxcompress.operators import TABLE
from onnxcompress.outlook import Runs
from onnxcompress.validation.audit import audit
from tests.passes.calibrated import feeds_of
from tests.passes.exactness import Net
from tests.passes.test_insert_qdq import conv

SHIPPED = ("coreml", "cpu", "cpu-arm", "cuda", "openvino", "qnn", "tensorrt", "web")


def table() -> dict[str, Any]:
    """The one of cpu, to be broken."""
    file = resources.files("onnxcompress.targets") / "cpu.toml"
    return tomllib.loads(file.read_text("utf-8"))


def test_what_ships() -> None:
    assert {*SHIPPED} <= {*targets.names()}
    help_of_target = next(p for p in main.commands["compress"].params if p.name == "target")
    words = getattr(help_of_target, "help", "").replace(",", " ").split()
    assert {*SHIPPED} <= {*words}


@pytest.mark.parametrize("name", SHIPPED)
def test_each_names_operators_that_are_known_and_says_where_it_is_from(name: str) -> None:
    target = targets.load(name)
    assert target.name == name and target.description and target.provider
    assert {*target.kernels, *target.moves, *target.absorbs, *target.dynamic} <= {*TABLE}
    assert not {*target.kernels} & {*target.moves}
    assert any(kernel.anchor for kernel in target.kernels.values()) == bool(target.kernels)
    assert not target.measurable or target.provider == "CPUExecutionProvider"
    assert target.activations.dtype not in target.activations.alternatives


def misspell(found: dict[str, Any]) -> None:
    found["kernals"] = found.pop("kernels")


def misspell_inside(found: dict[str, Any]) -> None:
    found["kernels"]["Conv"]["ancor"] = True


def name_no_operator(found: dict[str, Any]) -> None:
    found["moves"]["Reshaped"] = 5


def leave_out(found: dict[str, Any]) -> None:
    del found["weights"]["bias"]


def mistype(found: dict[str, Any]) -> None:
    found["activations"]["dtype"] = "unit8"


def no_table(found: dict[str, Any]) -> None:
    found["moves"] = ["Reshape"]


def no_number(found: dict[str, Any]) -> None:
    found["moves"]["Reshape"] = "5"


def name_itself(found: dict[str, Any]) -> None:
    found["name"] = "cpu"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (misspell, r"target 't': no option 'kernals', did you mean 'kernels'\?"),
        (misspell_inside, r"'kernels': 'Conv': no option 'ancor', did you mean 'anchor'\?"),
        (name_no_operator, r"target 't': no operator 'Reshaped', did you mean 'Reshape'\?"),
        (leave_out, r"target 't': option 'weights': 'bias' must be given"),
        (mistype, r"option 'dtype' must be one of 'uint8', .* not 'unit8', did you mean 'uint8'"),
        (no_table, r"option 'moves' must be a table, not \['Reshape'\]"),
        (no_number, r"option 'moves': 'Reshape' must be a whole number, not '5'"),
        (name_itself, r"target 't': it is named by its file"),
    ],
)
def test_a_file_is_read_strictly(spoil: Callable[[dict[str, Any]], None], words: str) -> None:
    found = table()
    assert targets.parse("t", found).kernels == targets.load("cpu").kernels
    spoil(found)
    with pytest.raises(InputError, match=words):
        targets.parse("t", found)


def test_16_bits_raise_the_opset() -> None:
    qnn = targets.load("qnn")
    assert qnn.with_activations(None) is qnn
    wide = qnn.with_activations("uint16")
    assert (qnn.opset, wide.opset, wide.activations.dtype) == (13, 21, "uint16")
    assert wide.name == "qnn"


def test_quantize_raises_the_opset_for_16_bits(model: Path, feeds: dict[str, np.ndarray]) -> None:
    found = api.quantize(model, feeds, target="qnn", activations="uint16").model
    assert found.graph.opset_imports[""] == 21
    kinds = {v.dtype for n in found.graph if n.op_type == "QuantizeLinear" for v in n.outputs}
    assert kinds == {ir.DataType.UINT16}


@pytest.fixture
def feeds() -> dict[str, np.ndarray]:
    samples = [feed["x"] for feed in feeds_of(network())]
    return {"x": np.concatenate(samples * 3)}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "m.onnx"
    onnx.save(network().model(), path)
    return path


def network() -> Net:
    net = Net()
    x = net.op("Relu", conv(net, net.input("x", 1, 8, 10, 10), c_out=32))
    x = net.op("Tanh", conv(net, x, 32, 16))
    x = net.op(
        "GlobalAveragePool", conv(net, net.op("Resize", x, "", scales(net), mode="linear"), 16)
    )
    net.op("Gemm", net.op("Flatten", x), net.normal("w", 8, 5), net.normal("b", 5), out="y")
    net.output("y")
    return net


def scales(net: Net) -> str:
    return net.weight("scales", [1, 1, 2, 2])


def fates(found: Inspection) -> dict[tuple[str, Runs], str]:
    return {(node.op, node.runs): node.reason for node in found.nodes}


def test_inspection_says_of_every_node_what_becomes_of_it(model: Path) -> None:
    found = inspect(model)
    assert len(found.nodes) == 9 and found.integer_share == 1
    assert all(bool(node.reason) == (node.runs is Runs.FLOAT) for node in found.nodes)
    told = fates(found)
    assert ("Conv", Runs.INTEGERS) in told and ("Relu", Runs.ABSORBED) in told
    assert ("Flatten", Runs.MOVED) in told
    assert told["Tanh", Runs.FLOAT] == "no integer kernel on cpu"
    assert told["Resize", Runs.FLOAT] == "it makes new values in this form"
    macs = sum(node.macs or 0 for node in found.nodes)
    assert macs == audit(ir.load(model), feeds_of(network())[0]).macs


def test_inspection_of_a_runtime_without_integers(model: Path) -> None:
    found = inspect(model, target="coreml")
    assert found.integer == {} and found.integer_share == 0
    assert {node.reason for node in found.nodes} == {"no integer kernel on coreml"}


def test_inspection_tells_what_is_excluded_by_its_data(tmp_path: Path) -> None:
    net = Net(opset=17)
    x = net.input("x", "N", 32)
    weight = net.op("Mul", net.normal("w", 32, 32), net.op("ReduceMax", x, keepdims=0))
    y = net.op("Gemm", x, weight)
    net.op("Add", y, net.op("Sigmoid", y), out="y")
    net.output("y")
    net.op("Cast", net.op("Shape", "y"), to=1, out="z")
    net.output("z")
    onnx.save(net.model(), tmp_path / "m.onnx")
    told = fates(inspect(tmp_path / "m.onnx"))
    assert "computed" in told["Gemm", Runs.FLOAT]
    assert told["Shape", Runs.FLOAT] == "it computes no floats"
    assert told["Sigmoid", Runs.FLOAT] == "what it reads are no integers"


@pytest.mark.parametrize("target", ["tensorrt", "qnn", "openvino"])
def test_nothing_is_timed_for_a_runtime_elsewhere(
    model: Path, feeds: dict[str, np.ndarray], target: str
) -> None:
    out = model.with_name("out.onnx")
    report = compress(model, out, calibrate=feeds, target=target, effort="fast")
    assert report.measured.latency is None and report.measured.result is None
    assert {gate.gate.metric for gate in report.gates} == {"size_ratio", "sqnr"}
    assert any(target in note and "nothing was timed" in note for note in report.notes)
    assert report.audit is not None and report.audit.promised == target
    assert report.audit.share == 1 and not report.audit.unfused
    assert not any("latency" in attempt.because for attempt in report.attempts)
    assert next(a for a in report.attempts if a.kept).scheme == "static"
    onnx.checker.check_model(out, full_check=True)


def test_a_gate_on_latency_elsewhere_is_not_met(model: Path, feeds: dict[str, np.ndarray]) -> None:
    gate = Gate.parse("latency_ratio <= 2")
    with pytest.raises(GateError, match="latency_ratio was not measured"):
        compress(model, model.with_name("o"), calibrate=feeds, target="qnn", gates=[gate])
    assert not model.with_name("o").exists()


def test_a_scheme_that_a_runtime_has_no_kernels_for_is_refused(
    model: Path, feeds: dict[str, np.ndarray]
) -> None:
    for target, scheme in (("coreml", "static"), ("tensorrt", "dynamic")):
        with pytest.raises(InputError, match=f"'{target}' has no kernels for the {scheme} scheme"):
            compress(model, model.with_name("o"), calibrate=feeds, target=target, scheme=scheme)  # pyright: ignore[reportArgumentType]


def test_a_table_is_believed_only_for_what_stands_between_pairs(model: Path) -> None:
    elsewhere, here = targets.load("tensorrt"), targets.load("cpu")
    feed = feeds_of(network())[0]
    assert audit(ir.load(model), feed, elsewhere).share == 0
    assert audit(ir.load(model), feed, here).promised == ""
    quantized = api.quantize(model, feed, target="tensorrt").model
    found = audit(quantized, feed, targets.load("coreml"))
    assert found.share == 0 and found.promised == "coreml"
    assert {skip.reason for skip in found.unfused} == {"coreml has no kernel for it"}
