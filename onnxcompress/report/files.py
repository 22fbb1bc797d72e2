"""Writes a report to a file in the format that the file's name asks for."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable
from io import StringIO
from pathlib import Path

from onnxcompress.errors import InputError
from onnxcompress.model_io.atomic import write_file
from onnxcompress.report import Report, to_json

_WIDTH = 120


def check_path(path: Path, models: Iterable[Path]) -> None:
    """See that a report can be written to `path`, before the work that it will be about.

    Raises:
        InputError: if the folder is not there or not writable, the path is one of `models`, or a
            library is missing.
    """
    if os.path.realpath(path) in map(os.path.realpath, models):
        raise InputError(f"the report {path} would replace a model: name another file")
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise InputError(
            f"the report {path} cannot be written: name a file in a folder that you may write"
        )
    if path.suffix == ".html" and importlib.util.find_spec("jinja2") is None:
        raise InputError("an HTML report needs jinja2: pip install 'onnxcompress[report]'")


def write(report: Report, path: Path) -> None:
    """Write the report beside `path` and rename it: .html as a page, .json as data, else text.

    Raises:
        InputError: if it cannot be written.
    """
    if path.suffix == ".html":
        from onnxcompress.report.html import render

        text = render(report)
    elif path.suffix == ".json":
        text = to_json(report) + "\n"
    else:
        text = _as_text(report)
    try:
        write_file(path, text.encode())
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from error


def _as_text(report: Report) -> str:
    from rich.console import Console

    from onnxcompress.report.terminal import show

    file = StringIO()
    show(report, Console(file=file, width=_WIDTH))
    return file.getvalue()
