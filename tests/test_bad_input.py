"""Bad input: one sentence with a name and a remedy, the right exit code, nothing overwritten."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import parser

from onnxcompress import budget, variants
from onnxcompress.cli import main
from onnxcompress.gates import Gate
from onnxcompress.measure import Measurement

HEADER = '<ir_version: 8, opset_import: ["" : 17, "my.domain" : 1]>'
PRODUCT = f"""{HEADER} g (float[N, 4] x) => (float[N, 3] y)
<float[4, 3] w = {{1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3}}> {{ y = MatMul(x, w) }}"""
CUSTOM = f"{HEADER} g (float[N, 4] x) => (float[N, 4] y) {{ a = my.domain.Foo(x) y = Relu(a) }}"
UNKNOWN = f"{HEADER} g (float[N, 4] x) => (float[N, 4] y) {{ y = Nonsense(x) }}"
WAVES = f"{HEADER} g (float[N, 4] x) => (float[N, 4] y) {{ a = Sin(x) y = Cos(a) }}"

ON_MODEL = {
    "compress": ("compress", "{}", "-o", "out.onnx"),
    "optimize": ("optimize", "{}", "-o", "out.onnx"),
    "quantize": ("quantize", "{}", "-o", "out.onnx", "--calibrate", "good.npz"),
    "calibrate": ("calibrate", "{}", "-o", "out.npz", "--data", "good.npz"),
    "prune": ("prune", "{}", "-o", "out.onnx"),
    "validate": ("validate", "m.onnx", "{}"),
    "bench": ("bench", "{}"),
    "inspect": ("inspect", "{}"),
}
ON_DATA = {
    "compress": ("compress", "m.onnx", "-o", "out.onnx", "--calibrate", "{}"),
    "evaluate": ("compress", "m.onnx", "-o", "out.onnx", "--evaluate", "{}"),
    "quantize": ("quantize", "m.onnx", "-o", "out.onnx", "--calibrate", "{}"),
    "calibrate": ("calibrate", "m.onnx", "-o", "out.npz", "--data", "{}"),
    "validate": ("validate", "m.onnx", "m.onnx", "--data", "{}"),
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run in, with good files, bad ones, and earlier outputs; measuring is brief."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(variants, "_LATENCY_SECONDS", 0.05)
    alone = Measurement(path="m.onnx", size=1, p50_ms=1, p90_ms=1, runs=1, peak_memory=1)
    monkeypatch.setattr(variants, "measure", lambda *args, **kwargs: alone)  # pyright: ignore[reportUnknownLambdaType]
    for name, text in (("m", PRODUCT), ("custom", CUSTOM), ("unknown", UNKNOWN), ("waves", WAVES)):
        onnx.save(parser.parse_model(text), f"{name}.onnx")
    Path("out.onnx").write_bytes(b"earlier")
    Path("out.npz").write_bytes(b"earlier")
    Path("truncated.onnx").write_bytes(Path("m.onnx").read_bytes()[:-40])
    Path("text.onnx").write_text("hello")
    Path("empty.onnx").touch()
    Path("folder").mkdir()
    x = np.random.default_rng(0).standard_normal((20, 4)).astype(np.float32)
    save("good.npz", x=x)
    save("name.npz", X=x)
    save("shape.npz", x=x[:, :3])
    save("dtype.npz", x=x.astype(str))
    save("nan.npz", x=np.where(x == x[7, 2], np.nan, x))
    save("none.npz", x=x[:0])
    save("one.npz", x=x[:1])
    save("nothing.npz")
    save("labels.npz", x=x, labels=np.zeros(3, int))
    save("pickled.npz", x=np.array([{"a": 1}], dtype=object))
    Path("cut.npz").write_bytes(Path("good.npz").read_bytes()[:100])
    Path("feeds.py").write_text("def broken():\n    return 1 / 0\n")
    return tmp_path


def save(path: str, **arrays: Any) -> None:
    np.savez(path, **arrays)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def refuse(*arguments: str, words: tuple[str, ...], code: int = 2) -> str:
    """Run what must fail: one line on stderr with `words`, and every file as it was."""
    before = {p: p.read_bytes() for p in Path().iterdir() if p.is_file()}
    result = run(*arguments)
    assert result.exit_code == code, result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("onnxcompress: ") and result.stdout == ""
    assert all(word in line for word in words), line
    assert "Traceback" not in line and "unexpected" not in line and "Errno" not in line
    assert {p: p.read_bytes() for p in Path().iterdir() if p.is_file()} == before
    return line


@pytest.mark.parametrize("verb", ON_MODEL)
@pytest.mark.parametrize(
    ("model", "remedy"),
    [
        ("missing.onnx", "give the path of an ONNX model"),
        ("truncated.onnx", "export or copy it again"),
        ("text.onnx", "export or copy it again"),
        ("empty.onnx", "export or copy it again"),
        ("folder", "give the path of the ONNX model in it"),
        ("good.npz", "export or copy it again"),
    ],
)
def test_what_is_no_model(verb: str, model: str, remedy: str):
    refuse(*(part.format(model) for part in ON_MODEL[verb]), words=(model, remedy))


@pytest.mark.parametrize("verb", ON_DATA)
@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("missing.npz", ("does not exist", "give data as a path")),
        ("name.npz", ("no array 'x'", "there is 'X'", "inputs are 'x'")),
        ("shape.npz", ("shape [20, 3]", "make dimension 1 4")),
        ("dtype.npz", ("<U", "convert it with .astype(np.float32)")),
        ("nan.npz", ("sample 7", "NaN", "clean the data")),
        ("none.npz", ("empty", "at least one sample")),
        ("nothing.npz", ("no array 'x'",)),
        ("labels.npz", ("equally many samples", "'x' 20, 'labels' 3")),
        ("pickled.npz", ("pickled", "save numbers")),
        ("cut.npz", ("cannot be read", "write it again")),
        ("folder", ("holds no .npz, images",)),
        ("m.onnx", ("convert the data to .npz",)),
        ("no_such_module:feeds", ("no_such_module",)),
        ("feeds.py:missing", ("feeds.py has no 'missing'",)),
        ("feeds.py:broken", ("ZeroDivisionError",)),
    ],
)
def test_data_that_do_not_suit_the_model(verb: str, data: str, words: tuple[str, ...]):
    refuse(*(part.format(data) for part in ON_DATA[verb]), words=(data, *words))


def test_one_sample_cannot_be_held_out_but_can_calibrate():
    words = ("one.npz", "none can be held out", "other data to compare on")
    refuse("compress", "m.onnx", "-o", "out.onnx", "--calibrate", "one.npz", words=words)
    arguments = ("--calibrate", "one.npz", "--evaluate", "good.npz", "--gate", "sqnr >= 1")
    assert run("compress", "m.onnx", "-o", "out.onnx", *arguments).exit_code == 0


@pytest.mark.parametrize("verb", ["compress", "optimize", "quantize", "prune", "calibrate"])
@pytest.mark.parametrize(
    ("output", "remedy"),
    [
        ("nowhere/out.onnx", "create it"),
        ("folder", "name a file in it"),
        ("m.onnx/out.onnx", "create it"),
        ("out.onnxtxt", "use the suffix .onnx"),
    ],
)
def test_an_output_that_cannot_be_written(verb: str, output: str, remedy: str):
    command = list(ON_MODEL[verb])
    command[command.index("-o") + 1] = output
    refuse(*(part.format("m.onnx") for part in command), words=(output, remedy))


@pytest.mark.parametrize(
    ("report", "remedy"),
    [
        ("nowhere/report.html", "name a file in a folder that you may write"),
        ("folder", "name a file in a folder that you may write"),
        ("m.onnx", "name another file"),
        ("out.onnx", "name another file"),
    ],
)
def test_a_report_that_cannot_be_written(report: str, remedy: str):
    words = (report, remedy)
    refuse("compress", "m.onnx", "-o", "out.onnx", "--report", report, words=words)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ('[[passes]]\nname = "insert_qdp"', ("pass 1", "did you mean 'insert_qdq'")),
        ('[[passes]]\nname = "insert_qdq"\nmetod = "mse"', ("did you mean 'method'",)),
        ('[[passes]]\nname = "insert_qdq"\nmethod = "best"', ("'method'", "one of", "'minmax'")),
        ('[[passes]]\nname = "insert_qdq"\nper_channel = 1', ("true or false, not 1",)),
        ('[[passes]]\nname = "insert_qdq"\npercentile = 3.0', ("over 50 and at most 100",)),
        ('target = "cpuu"', ("did you mean 'cpu'",)),
        ('[gates]\nsqrn = ">= 3"', ("did you mean 'sqnr'",)),
        ("[gates]\nsqnr = 3", ('such as ">= 0.98"',)),
        ("passes = ", ("not valid TOML",)),
        ("[pases]", ("did you mean 'passes'",)),
    ],
)
def test_a_recipe_with_something_unknown(recipe: str, words: tuple[str, ...]):
    Path("r.toml").write_text(recipe)
    command = ("compress", "m.onnx", "-o", "out.onnx", "--recipe", "r.toml")
    refuse(*command, words=("r.toml", *words))


def test_a_recipe_that_is_not_there():
    command = ("compress", "m.onnx", "-o", "out.onnx", "--recipe", "r.toml")
    refuse(*command, words=("r.toml", "check the path"))


@pytest.mark.parametrize("verb", ["compress", "validate"])
@pytest.mark.parametrize(
    ("gate", "words"),
    [
        ("sqrn >= 3", ("did you mean 'sqnr'",)),
        ("sqnr", ("write a metric",)),
        ("sqnr == 3", ("write a metric",)),
        ("sqnr >= high", ("'high' is not a number",)),
    ],
)
def test_a_gate_that_says_nothing(verb: str, gate: str, words: tuple[str, ...]):
    command = (part.format("m.onnx") for part in ON_MODEL[verb])
    refuse(*command, "--gate", gate, words=(gate, *words))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("compress", "--target", "gpu"), ("'gpu'", "cpu")),
        (("compress", "--scheme", "static"), ("needs calibration data",)),
        (("compress", "--images", "sise=[2, 2]"), ("did you mean 'size'",)),
        (("compress", "--images", "size="), ("write them as",)),
        (("quantize",), ("needs calibration data", "another scheme")),
        (("quantize", "--scheme", "dynamic", "--method", "mse"), ("--method", "leave it out")),
        (("quantize", "--scheme", "dynamic", "--calibrate", "good.npz"), ("leave it out",)),
        (("quantize", "--calibrate", "good.npz", "--percentile", "3"), ("over 50",)),
        (("quantize", "--statistics", "good.npz"), ("good.npz", "calibrate again")),
        (("quantize", "--statistics", "missing.npz"), ("missing.npz",)),
        (("prune", "--sparsity", "2"), ("from 0 to 1",)),
        (("prune", "--sparsity", "0.5", "--threshold", "1"), ("not both",)),
    ],
)
def test_options_that_make_no_sense(options: tuple[str, ...], words: tuple[str, ...]):
    refuse(options[0], "m.onnx", "-o", "out.onnx", *options[1:], words=words)


def test_a_gate_that_is_not_met_leaves_the_output_as_it_was():
    command = ("compress", "m.onnx", "-o", "out.onnx", "--gate", "size_ratio <= 0.001")
    result = run(*command)
    last = result.stderr.splitlines()[-1]
    assert result.exit_code == 3 and "nothing was written" in last and "size_ratio" in last
    assert Path("out.onnx").read_bytes() == b"earlier"
    assert "not written, a gate was not met" in " ".join(result.stderr.split())


def test_validate_holds_gates_too():
    result = run("validate", "m.onnx", "m.onnx", "--gate", "size_ratio <= 0.5")
    last = result.stderr.splitlines()[-1]
    assert result.exit_code == 3 and last.startswith("onnxcompress: m.onnx: size_ratio is 1")


@pytest.mark.parametrize("verb", ["compress", "validate", "bench"])
@pytest.mark.parametrize("model", ["custom.onnx", "unknown.onnx"])
def test_a_model_that_the_runtime_does_not_run(verb: str, model: str):
    arguments = {
        "compress": (model, "-o", "out.onnx"),
        "validate": (model, model),
        "bench": (model,),
    }
    refuse(verb, *arguments[verb], words=("ONNX Runtime cannot load", model))


@pytest.mark.parametrize("verb", ["optimize", "prune"])
@pytest.mark.parametrize("model", ["custom.onnx", "unknown.onnx"])
def test_what_need_not_run_is_rewritten_all_the_same(verb: str, model: str):
    result = run(verb, model, "-o", "out.onnx")
    assert result.exit_code == 0, result.stderr
    before, after = (onnx.load(name).graph for name in (model, "out.onnx"))
    assert [n.op_type for n in after.node] == [n.op_type for n in before.node]


def test_a_model_with_nothing_to_quantize_succeeds():
    result = run("compress", "waves.onnx", "-o", "out.onnx", "--calibrate", "good.npz")
    assert result.exit_code == 0, result.stderr
    assert [n.op_type for n in onnx.load("out.onnx").graph.node] == ["Sin", "Cos"]


def test_a_model_that_nothing_improves_is_written_as_it_came(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(budget, "DEFAULT_GATES", (Gate("size_ratio", "<=", 0.0),))
    result = run("compress", "waves.onnx", "-o", "out.onnx", "--calibrate", "good.npz")
    assert result.exit_code == 0 and "the output is the model as it came" in result.stderr
    assert [n.op_type for n in onnx.load("out.onnx").graph.node] == ["Sin", "Cos"]


@pytest.mark.parametrize("verb", ["optimize", "prune"])
def test_a_model_may_be_replaced_by_what_comes_of_it(verb: str, folder: Path):
    assert run(verb, "m.onnx", "-o", "m.onnx").exit_code == 0
    assert [n.op_type for n in onnx.load("m.onnx").graph.node] == ["MatMul"]
    assert not [p for p in folder.iterdir() if p.name.startswith(".")], "no leftovers"


def test_links_are_followed_and_stay():
    Path("folder/real.onnx").write_bytes(Path("m.onnx").read_bytes())
    Path("link.onnx").symlink_to("folder/real.onnx")
    assert run("optimize", "link.onnx", "-o", "link.onnx").exit_code == 0
    assert run("optimize", "m.onnx", "-o", "out.onnx").exit_code == 0
    assert Path("link.onnx").is_symlink()
    assert Path("folder/real.onnx").read_bytes() == Path("out.onnx").read_bytes()


def test_a_broken_link_is_a_missing_file():
    Path("link.onnx").symlink_to("gone.onnx")
    refuse("optimize", "link.onnx", "-o", "out.onnx", words=("link.onnx", "does not exist"))


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("optimize", "missing.onnx", "-o", "out.onnx"), 2),
        (("compress", "m.onnx", "-o", "out.onnx", "--calibrate", "nan.npz"), 2),
        (("compress", "unknown.onnx", "-o", "out.onnx"), 2),
    ],
)
def test_the_program_itself_fails_in_one_line(arguments: tuple[str, ...], code: int):
    program = Path(sys.executable).with_name("onnxcompress")
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == code and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert Path("out.onnx").read_bytes() == b"earlier"
