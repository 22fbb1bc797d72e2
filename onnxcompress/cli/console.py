"""What a person or a program sees of a verb: progress, results, and failures in one sentence."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from onnxcompress.errors import OnnxCompressError

if TYPE_CHECKING:
    from rich.console import Console

    from onnxcompress.observe import Progress
    from onnxcompress.report import Report


class Verb(click.Command):
    """A verb whose failures are one sentence and an exit code, never a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except OnnxCompressError as error:
            _fail(str(error), error.exit_code)
        except MemoryError:
            _fail("out of memory: use a smaller --samples or a machine with more", 1)
        except (click.exceptions.Exit, click.ClickException, click.Abort):
            raise
        except Exception as error:
            if os.environ.get("ONNXCOMPRESS_TRACEBACK"):
                raise
            name = type(error).__name__
            _fail(f"unexpected {name}: {error} (ONNXCOMPRESS_TRACEBACK=1 shows where)", 1)


def _fail(message: str, code: int) -> NoReturn:
    shown = "".join(c if c.isprintable() else " " for c in message)
    click.echo(f"onnxcompress: {' '.join(shown.split())}", err=True)
    raise click.exceptions.Exit(code)


def emit(content: object, as_json: bool, show: Callable[[Console], None]) -> None:
    """One JSON object to stdout for programs, or text to stderr for people."""
    if as_json:
        click.echo(json.dumps(content, sort_keys=True, indent=2))
        return
    from rich.console import Console

    show(Console(stderr=True))


def tell(report: Report, path: Path | None, as_json: bool) -> None:
    """A report as its verb's result, and written to `path` if there is one.

    Raises:
        InputError: if it cannot be written.
    """
    from onnxcompress.report import terminal, to_json
    from onnxcompress.report.files import write

    if path is not None:
        write(report, path)
    emit(json.loads(to_json(report)), as_json, lambda console: terminal.show(report, console))


@contextmanager
def stages(quiet: bool) -> Generator[Callable[[str], Progress]]:
    """Progress bars on a terminal, one a stage; silence elsewhere."""
    if quiet or not sys.stderr.isatty():
        yield lambda name: lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import Progress as Bars

    with Bars(console=Console(stderr=True), transient=True) as bars:

        def stage(name: str) -> Progress:
            for earlier in bars.tasks:
                bars.update(earlier.id, visible=False)
            task = bars.add_task(name, total=None)

            def progress(done: int, total: int | None) -> None:
                bars.update(task, completed=done, total=total)

            return progress

        yield stage
