"""The passes lie in `passes/`, are imported as `onnxcompress.passes`, and ship exactly once."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import onnxcompress.passes

ROOT = Path(__file__).parent.parent


def test_the_link_leads_to_the_passes():
    link = ROOT / "onnxcompress" / "passes"
    if not link.is_symlink():
        pytest.skip("not a checkout")
    assert link.readlink() == Path("../passes")
    assert link.resolve() == ROOT / "passes"
    assert Path(onnxcompress.passes.__file__).resolve() == ROOT / "passes" / "__init__.py"


def test_the_wheel_holds_every_file_once(tmp_path: Path):
    pytest.importorskip("hatchling")
    build = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    with zipfile.ZipFile(tmp_path / done.stdout.split()[-1]) as wheel:
        names = wheel.namelist()
    assert len(names) == len(set(names))
    passes = {f"onnxcompress/passes/{p.name}" for p in (ROOT / "passes").glob("*.py")}
    assert passes == {n for n in names if "passes/" in n}
    assert "onnxcompress/targets/cpu.toml" in names
    assert {n.split("/")[0].partition("-")[0] for n in names} == {"onnxcompress"}
