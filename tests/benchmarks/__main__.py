"""All benchmarks, as Markdown: python -m tests.benchmarks, which is what `make bench` runs.

Absolute times are this machine's, as busy as it was; what is in one row was measured in turns.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

from tests.benchmarks import (
    ablation,
    compare,
    corpus,
    cost,
    distillation,
    growth,
    ladder,
    reconstruct,
    thorough,
    train_step,
    tune,
)
from tests.benchmarks.cases import Setting
from tests.benchmarks.job import ROOT

SECTIONS: dict[str, tuple[str, Callable[[Setting], Iterator[str]]]] = {
    "compare": ("Ours beside ONNX Runtime's quantizer and NNCF", compare.tables),
    "ladder": ("One method more a rung", ladder.tables),
    "ablation": ("One method less", ablation.tables),
    "cost": ("What calibration and the whole job cost", cost.tables),
    "thorough": ("What compensation costs beside plain inference", thorough.tables),
    "growth": ("How cost grows with nodes and weights", growth.tables),
    "reconstruct": ("Rounding by reconstruction", reconstruct.tables),
    "train_step": ("A training step beside PyTorch's", train_step.tables),
    "distillation": ("What a teacher is worth to a student", distillation.tables),
    "tune": ("What tuning gives back of few bits", tune.tables),
    "corpus": ("Exact passes on the models of the onnx wheel", corpus.tables),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is asked for, printing each line as soon as it is known."""
    given = _parser().parse_args(arguments)
    zoo = (given.zoo or ROOT.parent / "shared" / "zoo").resolve()
    sections = [name for name in given.only if name in SECTIONS] or list(SECTIONS)
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(
            folder=Path(folder).resolve(),
            zoo=zoo if zoo.is_dir() else None,
            only=tuple(name for name in given.only if name not in SECTIONS),
            quick=given.quick,
            rounds=1 if given.quick else given.rounds,
        )
        lines: list[str] = []
        for line in _lines(sections, setting):
            print(line, flush=True)
            lines.append(line)
    if given.markdown:
        given.markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _lines(sections: Sequence[str], setting: Setting) -> Iterator[str]:
    packages = ("onnxcompress", "onnxruntime", "onnx", "onnx-ir", "numpy")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    yield f"{versions}; Python {platform.python_version()}; {os.cpu_count()} CPUs"
    yield ""
    for name in sections:
        title, tables = SECTIONS[name]
        yield f"## {title}"
        yield ""
        yield from tables(setting)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"sections ({', '.join(SECTIONS)}) and models to run; all when left out",
    )
    parser.add_argument("--zoo", type=Path, help="real models beside the checkout")
    parser.add_argument("--markdown", type=Path, metavar="OUT.md", help="also write to this file")
    parser.add_argument("--rounds", type=int, default=3, help="how often a job is timed")
    parser.add_argument("--quick", action="store_true", help="small, one round: only to see it run")
    return parser


if __name__ == "__main__":
    main(sys.argv[1:])
