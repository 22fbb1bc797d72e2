"""The command line: verbs and flags to calls of the API; nothing heavy is imported before."""

from __future__ import annotations

import atexit
import gc

import click

from onnxcompress.cli import flags
from onnxcompress.cli.compress import compress
from onnxcompress.cli.distill import distill
from onnxcompress.cli.examine import bench, inspect, validate
from onnxcompress.cli.rewrite import calibrate, optimize, prune, quantize
from onnxcompress.cli.tune import tune

_VERBS = (compress, optimize, quantize, calibrate, prune, distill, tune, validate, bench, inspect)


@click.group(epilog=flags.EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="onnxcompress")
def main() -> None:
    """Make trained ONNX models smaller and faster, and prove that they still work.

    Start with: onnxcompress compress model.onnx -o small.onnx --calibrate inputs.npz
    """


for verb in _VERBS:
    main.add_command(verb)
# On its way out Python looks for garbage once more, which in a large graph takes seconds.
atexit.register(gc.freeze)
