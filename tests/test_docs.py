"""What the README and the guide show runs as it stands there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from onnxcompress import budget, variants
from onnxcompress.cli import main
from onnxcompress.measure import Measurement

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "docs/guide.md")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#:]+)\)")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with the checkout's models, as a reader has it; measuring is brief."""
    monkeypatch.chdir(tmp_path)
    Path("models").symlink_to(ROOT / "models")
    monkeypatch.setattr(variants, "_LATENCY_SECONDS", 0.1)
    alone = Measurement(path="m.onnx", size=1, p50_ms=1, p90_ms=1, runs=1, peak_memory=1)
    monkeypatch.setattr(variants, "measure", lambda *args, **kwargs: alone)  # pyright: ignore[reportUnknownLambdaType]
    monkeypatch.setattr(
        budget, "DEFAULT_GATES", ()
    )  # a busy machine's timing is not the document's


def run_shell(script: str) -> None:
    for line in script.replace("\\\n", " ").splitlines():
        program, *arguments = shlex.split(line)
        assert program == "onnxcompress", "blocks of sh hold our commands only; others are console"
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, f"{line}\n{result.output}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_block_runs(document: str):
    blocks = BLOCK.findall((ROOT / document).read_text(encoding="utf-8"))
    assert blocks
    names: dict[str, object] = {"__name__": "document"}
    for language, text in blocks:
        if language == "sh":
            run_shell(text)
        elif language == "python":
            exec(compile(text, document, "exec", dont_inherit=True), names)
        elif file := re.match(r"# (\w+\.toml)\n", text):
            Path(file[1]).write_text(text, encoding="utf-8")


def test_make_has_what_the_readme_names():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"\bmake (\w+)", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert named >= {"demo", "test", "check", "bench"}
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in named)


def test_the_readme_names_every_verb():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) == set(main.commands)


@pytest.mark.parametrize("document", [*DOCUMENTS, "models/README.md"])
def test_links_lead_somewhere(document: str):
    path = ROOT / document
    for target in LINK.findall(path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target
