"""The verbs as people and programs use them, and the package as Python does."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import click
import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import parser

import onnxcompress
from onnxcompress import api, budget, variants
from onnxcompress.cli import main
from onnxcompress.data.images import Images
from onnxcompress.errors import InputError
from onnxcompress.gates import METRICS
from onnxcompress.measure import Measurement
from onnxcompress.options import fields
from onnxcompress.passes.insert_qdq import InsertQdq
from onnxcompress.passes.prune_magnitude import PruneMagnitude

HEAVY = ("numpy", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "rich", "jinja2")
PROGRAM = Path(sys.executable).with_name("onnxcompress")
VERBS = sorted(main.commands)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder to run in, with a model of two products and its data; measuring is brief."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(variants, "_LATENCY_SECONDS", 0.05)
    alone = Measurement(path="m.onnx", size=1, p50_ms=1, p90_ms=1, runs=1, peak_memory=1)
    monkeypatch.setattr(variants, "measure", lambda *args, **kwargs: alone)  # pyright: ignore[reportUnknownLambdaType]
    model = parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 16] x) => (float[N, 16] y) {
            a = MatMul(x, w)  b = Relu(a)  y = MatMul(b, w)
        }""")
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((16, 16)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    onnx.save(model, "m.onnx")
    np.savez("x.npz", x=rng.standard_normal((40, 16)).astype(np.float32))


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def imported_after(code: str) -> list[str]:
    """The heavy modules that are there after `code` ran in a process of its own."""
    ask = f"import sys\n{code}\nprint(*(m for m in {HEAVY!r} if m in sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    return done.stderr.split()


def help_of(verb: str) -> str:
    return " ".join(run(verb, "--help").output.split())


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_imports_nothing_heavy(verb: str):
    call = f"main({[*verb.split(), '--help']!r}, standalone_mode=False)"
    assert imported_after(f"from onnxcompress.cli import main\n{call}") == []


def test_the_package_imports_nothing_heavy():
    assert imported_after("import onnxcompress") == []
    assert imported_after("import onnxcompress\nonnxcompress.GateError") == []


@pytest.mark.parametrize("name", onnxcompress.__all__)
def test_every_public_name_is_the_thing_and_no_module(name: str):
    found = getattr(onnxcompress, name)
    assert isinstance(found, FunctionType | type) and not isinstance(found, ModuleType)
    assert found.__doc__ and found.__name__ == name


def test_no_module_hides_a_public_name():
    package = Path(str(onnxcompress.__file__)).parent
    assert not {p.stem for p in package.iterdir()} & {*onnxcompress.__all__}
    assert set(onnxcompress.__all__) <= set(dir(onnxcompress))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'compres'"):
        onnxcompress.__getattr__("compres")
    assert onnxcompress.__version__ == run("--version").output.split()[-1]


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_has_help_and_every_verb_an_example(verb: str):
    command = main.commands[verb]
    options = [p for p in command.params if isinstance(p, click.Option)]
    assert all(option.help for option in options)
    assert f"onnxcompress {verb} " in help_of(verb) and "Exit codes: 0 done" in help_of(verb)


def test_the_list_of_verbs_is_not_cut_short():
    assert "..." not in run("--help").output.split("Commands:")[1]


def test_help_states_the_defaults():
    compress = help_of("compress")
    for gate in (*budget.DEFAULT_GATES, budget.DEFAULT_DROP):
        assert str(gate) in compress
    assert f"[default: {api.SAMPLES};" in compress
    quantize, prune = help_of("quantize"), help_of("prune")
    assert f"[default: {InsertQdq().method}]" in quantize
    assert f"[default: {InsertQdq().percentile}]" in quantize
    assert f"[default: {PruneMagnitude().scope}]" in prune


def test_help_lists_every_metric_and_every_image_option():
    compress = help_of("compress")
    assert all(f" {name} " in compress for name in METRICS)
    assert all(name in compress.split("IMAGES is")[1] for name in fields(Images))


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (("compress", "m.onnx", "-o", "out.onnx", "--calibrate", "x.npz"), "attempts"),
        (("optimize", "m.onnx", "-o", "out.onnx"), "passes"),
        (("quantize", "m.onnx", "-o", "out.onnx", "--calibrate", "x.npz"), "passes"),
        (("calibrate", "m.onnx", "-o", "s.npz", "--data", "x.npz"), "values"),
        (("prune", "m.onnx", "-o", "out.onnx", "--sparsity", "0.5"), "passes"),
        (("validate", "m.onnx", "m.onnx", "--data", "x.npz"), "validation"),
        (("bench", "m.onnx", "m.onnx", "--seconds", "0.1"), "models"),
        (("inspect", "m.onnx"), "operators"),
    ],
)
def test_json_is_one_object_and_nothing_else(arguments: tuple[str, ...], key: str):
    result = run(*arguments, "--json")
    assert result.exit_code == 0 and result.stderr == ""
    assert json.loads(result.stdout)[key]


def test_json_of_a_missed_gate_is_on_stdout_and_the_sentence_on_stderr():
    result = run("compress", "m.onnx", "-o", "out.onnx", "--gate", "size_ratio <= 0", "--json")
    assert result.exit_code == 3 and not Path("out.onnx").exists()
    assert json.loads(result.stdout)["gates"][0]["passed"] is False
    assert len(result.stderr.splitlines()) == 1


def test_text_for_people_goes_to_stderr():
    result = run("optimize", "m.onnx", "-o", "out.onnx")
    assert result.stdout == "" and "out.onnx" in result.stderr and "size" in result.stderr


@pytest.mark.parametrize(("name", "start"), [("r.html", "<!doctype"), ("r.json", "{"), ("r", "")])
def test_the_report_is_written_as_its_name_says(name: str, start: str):
    assert run("validate", "m.onnx", "m.onnx", "--report", name).exit_code == 0
    text = Path(name).read_text(encoding="utf-8")
    assert text.lower().startswith(start) and "m.onnx" in text


def test_statistics_stand_in_for_data():
    for part in ("a", "b"):
        assert run("calibrate", "m.onnx", "-o", f"{part}.npz", "--data", "x.npz").exit_code == 0
    observed = ("--statistics", "a.npz", "--statistics", "b.npz")
    assert run("quantize", "m.onnx", "-o", "merged.onnx", *observed).exit_code == 0
    assert run("quantize", "m.onnx", "-o", "direct.onnx", "--calibrate", "x.npz").exit_code == 0
    merged, direct = (onnx.load(f"{name}.onnx") for name in ("merged", "direct"))
    assert "QuantizeLinear" in {n.op_type for n in merged.graph.node}
    assert [n.op_type for n in merged.graph.node] == [n.op_type for n in direct.graph.node]


def test_a_recipe_runs_its_passes_and_holds_its_gates():
    Path("r.toml").write_text("""
        [gates]
        sqnr = ">= 15"
        [[passes]]
        name = "infer_shapes"
        [[passes]]
        name = "insert_qdq"
        method = "percentile"
    """)
    options = ("--recipe", "r.toml", "--calibrate", "x.npz", "--json")
    result = run("compress", "m.onnx", "-o", "out.onnx", *options)
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    (kept,) = (attempt for attempt in found["attempts"] if attempt["kept"])
    assert kept["scheme"] == "recipe"
    assert [p["name"] for p in found["passes"]] == ["infer_shapes", "insert_qdq"]
    assert found["passes"][1]["options"]["method"] == "percentile"
    assert [gate["gate"]["metric"] for gate in found["gates"]] == ["sqnr"]


def test_a_gate_holds_how_much_runs_on_integers():
    wanted = ("--gate", "integer_share >= 1", "--json")
    compress = ("compress", "m.onnx", "-o", "out.onnx", "--calibrate", "x.npz", *wanted)
    found = json.loads(run(*compress).stdout)
    assert found["audit"]["integer_macs"] == found["audit"]["macs"] == 2 * 16 * 16
    assert run("validate", "m.onnx", "out.onnx", *wanted).exit_code == 0
    assert run("validate", "m.onnx", "m.onnx", *wanted).exit_code == 3


def test_an_audit_that_cannot_be_made_is_a_warning(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise InputError("no room")

    monkeypatch.setattr(variants, "audit", refuse)
    found = run("validate", "m.onnx", "m.onnx", "--json")
    assert found.exit_code == 0 and json.loads(found.stdout)["audit"] is None
    assert json.loads(found.stdout)["warnings"][0].endswith("cannot be told: no room")


def test_what_is_left_out_of_a_comparison_is_told():
    for verb in (("validate", "m.onnx", "m.onnx", "--data"), ("compress", "m.onnx", "-o", "o.onnx",
                 "--evaluate")):  # fmt: skip
        notes = json.loads(run(*verb, "x.npz", "--samples", "7", "--json").stdout)["notes"]
        assert "compared on the first 7 of 40 feeds, as many as samples says" in notes


def test_dynamic_quantization_takes_its_options():
    options = ("--scheme", "dynamic", "--exclude", "MatMul")
    assert run("quantize", "m.onnx", "-o", "out.onnx", *options).exit_code == 0
    assert [n.op_type for n in onnx.load("out.onnx").graph.node] == ["MatMul", "Relu", "MatMul"]


def test_weights_alone_take_their_options():
    model = parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 64] x) => (float[N, 64] y) { y = MatMul(x, w) }""")
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    onnx.save(model, "w.onnx")
    options = ("--scheme", "weights", "--bits", "8", "--block-size", "16")
    assert run("quantize", "w.onnx", "-o", "out.onnx", *options).exit_code == 0
    (node,) = onnx.load("out.onnx").graph.node
    found = {a.name: a.i for a in node.attribute}
    assert node.op_type == "MatMulNBits" and (found["bits"], found["block_size"]) == (8, 16)
    done = run("compress", "w.onnx", "-o", "small.onnx", *options, "--gate", "size_ratio <= 0.5")
    assert done.exit_code == 0 and onnx.load("small.onnx").graph.node[0].op_type == "MatMulNBits"


@pytest.mark.parametrize(
    ("scheme", "option"),
    [("dynamic", "--bits=8"), ("static", "--block-size=16"), ("weights", "--per-tensor")],
)
def test_an_option_of_another_scheme_is_refused(scheme: str, option: str):
    done = run("quantize", "m.onnx", "-o", "out.onnx", "--scheme", scheme, option)
    assert done.exit_code == 2 and "belongs to" in done.output
    assert not Path("out.onnx").exists()


def terminal(*arguments: str) -> str:
    """What the program writes to a terminal."""
    leader, follower = pty.openpty()
    done = subprocess.Popen([PROGRAM, *arguments], stdout=follower, stderr=follower)
    os.close(follower)

    def read() -> Iterator[bytes]:
        while True:
            try:
                yield os.read(leader, 4096)
            except OSError:  # the other end is closed
                return

    text = b"".join(read()).decode()
    assert done.wait() == 0
    os.close(leader)
    return text


def test_progress_shows_on_a_terminal_and_nowhere_else():
    command = ("calibrate", "m.onnx", "-o", "s.npz", "--data", "x.npz")
    assert "calibrating" in terminal(*command)
    done = subprocess.run([PROGRAM, *command], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines() == ["s.npz: statistics of 2 values"] and done.stdout == ""


def test_the_runtime_says_nothing_by_itself():
    noisy = parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
        g (float[2, 4] x) => (float[3, 4] y) <float[2] unused = {1, 2}> { y = Relu(x) }""")
    onnx.save(noisy, "noisy.onnx")
    command = [PROGRAM, "validate", "noisy.onnx", "noisy.onnx", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr == ""
