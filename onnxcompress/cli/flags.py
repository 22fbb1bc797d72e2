"""Arguments and options that several verbs share: their help, and what their text means."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from onnxcompress.data.images import Images
    from onnxcompress.gates import Gate

DATA = """\b
DATA is one of
  inputs.npz            arrays named after the model's inputs, samples on the first axis;
                        an array `labels` holds the targets
  inputs.npy            the same for a model of one input
  folder                of .npz feeds, of images (see --images), or of ONNX
                        test_data_set_* folders
  module:callable       or file.py:callable, which returns an iterable of feeds
"""
STUDENT = """\b
STUDENT is a model, or how to make one of the teacher, joined by +:
  drop:2       without the 2 layers or blocks that change its outputs least
  narrow:0.5   with half of the channels between layers
  fresh        with weights drawn anew
"""
IMAGES = """\b
IMAGES is a list such as 'size=[224, 224], mean=[0.485, 0.456, 0.406]' of
  size           [height, width], where the model leaves it open
  layout         "NCHW" or "NHWC", where the model leaves it open
  scale          what a pixel of 0 to 255 is multiplied by (1/255)
  mean, std      subtracted, then divided by; one number or one a channel ([0], [1])
  channels       "RGB", "BGR" or "GRAY" ("RGB")
  resize         "crop", "stretch" or "pad" ("crop")
  crop           share of the shorter side that is kept (0.875)
  fill           pixel around a padded image (0)
  interpolation  "bilinear", "bicubic" or "nearest" ("bilinear")
  labels         CSV file of image,number lines; else sub-folders are the classes
"""
GATES = """\b
GATE is a metric, a comparison and a number, such as 'sqnr >= 30':
  sqnr            signal to noise of the worst output in dB
  cosine          similarity of the worst output, at most 1
  max_error       largest difference of any output
  top1_agreement  share of samples whose first class is the original's
  top5_agreement  share of samples whose first class is in the original's five
  accuracy        against the labels
  accuracy_drop   the original's accuracy minus this one's
  integer_share   share of the multiplications that run on integers
  size_ratio      file size over the original's
  latency_ratio   latency over the original's, timed in turns
  memory_ratio    peak memory over the original's
"""
EXIT_CODES = """\b
Exit codes: 0 done, 1 unexpected failure, 2 bad usage or input, 3 a gate was not
met, 4 integrity or signature failure. A failure leaves every file as it was.
"""


def effort(default: str) -> Callable[[Any], Any]:
    """The option of how much is done against the error of static quantization."""
    return click.option(
        "--effort",
        type=click.Choice(["fast", "thorough", "best"]),
        default=default,
        show_default=True,
        help="thorough also equalizes and smooths channels, rounds weights by each layer's output "
        "and corrects biases (static); best then reconstructs blocks of layers against the float "
        "model, on data without labels (static, weights), which takes minutes.",
    )


def evaluate(source: str) -> Callable[[Any], Any]:
    """The option of what to compare on, where some of `source` is held out otherwise."""
    return click.option(
        "--evaluate",
        metavar="DATA",
        help=f"Inputs to compare on; else the last fifth of --{source}.",
    )


def recipe(text: str) -> Callable[[Any], Any]:
    """The option of a recipe; `text` says what is read from it."""
    return click.option("--recipe", type=click.Path(path_type=Path), help=text)


def learning(*, epochs: int, lr: str, zeros: str) -> Callable[[Any], Any]:
    """The options of how to train that recipes have too; unset ones are theirs to say."""
    options = (
        click.option("--epochs", type=int, help=f"Times through the data.  [default: {epochs}]"),
        click.option("--batch-size", type=int, help="Samples a step.  [default: 64]"),
        click.option("--lr", type=float, help=lr),
        click.option(
            "--temperature", type=float, help="Softens the teacher's answers.  [default: 2]"
        ),
        click.option("--keep-zeros", is_flag=True, default=None, help=zeros),
        click.option("--seed", type=int, help="Of all draws.  [default: 0]"),
    )

    def add(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def _whole(_context: click.Context, _option: click.Parameter, text: str | None) -> int | None:
    return None if text is None else int(text)


def examples(*lines: str) -> str:
    """Commands to copy, as a part of a verb's help."""
    return "\b\nExamples:\n" + "".join(f"  onnxcompress {line}\n" for line in lines)


def epilog(*parts: str) -> str:
    """What stands below a verb's options; the exit codes come last."""
    return "\n".join((*parts, EXIT_CODES))


model = click.argument("model", type=click.Path(path_type=Path))
output = click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="Model to write."
)
as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object to stdout.")
bits = click.option(
    "--bits",
    type=click.Choice(["4", "8"]),
    callback=_whole,
    help="Bits of a weight (weights).  [default: 4]",
)
block_size = click.option(
    "--block-size",
    type=int,
    help="Values that share a scale, a power of 2 of 16 or more; 0 is a whole channel (weights).  "
    "[default: 32]",
)
calibrate = click.option(
    "--calibrate", metavar="DATA", help="Inputs to observe; the static scheme needs them."
)
target = click.option(
    "--target",
    default="cpu",
    show_default=True,
    help="Runtime to aim at: cpu, cpu-arm, cuda, tensorrt, openvino, qnn, coreml, web, or one that "
    "a package adds.",
)
unlabelled = click.option("--unlabelled", metavar="DATA", help="More inputs, without labels.")
cache = click.option(
    "--cache", type=click.Path(path_type=Path), help="Folder to keep the teacher's answers in."
)
images = click.option("--images", help="How a folder of images becomes the input; see below.")
clean = click.option(
    "--clean",
    is_flag=True,
    help="Leave out inputs that are not finite or, of those observed, far from all others; the "
    "notes say which.",
)
samples = click.option(
    "--samples",
    type=click.IntRange(1),
    default=512,
    show_default=True,
    help="Feeds to use at most, from the first on.",
)
threads = click.option(
    "--threads",
    type=click.IntRange(0),
    default=1,
    show_default=True,
    help="Threads of an operator while timing; 0 is all cores.",
)
report = click.option(
    "--report",
    type=click.Path(path_type=Path),
    help="Report to write: .html is a page, .json for machines, else text.",
)
gates = click.option(
    "--gate", "gates", multiple=True, metavar="GATE", help="Bound to hold; repeatable."
)
max_drop = click.option(
    "--max-drop",
    type=float,
    metavar="SHARE",
    help="Accuracy that may be lost (0.01 is one point) or, without labels, share of decisions "
    "that may differ; layers go back to float until it holds.",
)
min_sqnr = click.option(
    "--min-sqnr",
    type=float,
    metavar="DB",
    help="Signal to noise that every output must keep; layers go back to float until it holds.",
)
include = click.option(
    "--include",
    multiple=True,
    metavar="PATTERN",
    help="Only nodes of this name or operator type (* and ? match); repeatable.",
)
exclude = click.option(
    "--exclude",
    multiple=True,
    metavar="PATTERN",
    help="Not nodes of this name or operator type (* and ? match); repeatable.",
)


def check_report(path: Path | None, *models: Path) -> None:
    """See that a report can be written beside `models`, before the work.

    Raises:
        InputError: if it cannot, or would replace one of them.
    """
    if path is None:
        return
    from onnxcompress.report.files import check_path

    check_path(path, models)


def read_gates(gates: tuple[str, ...]) -> list[Gate]:
    """The bounds that were asked for.

    Raises:
        InputError: if one is not of the form in `GATES`.
    """
    from onnxcompress.gates import Gate

    return [Gate.parse(text) for text in gates]


def read_images(text: str | None) -> Images | None:
    """How images become the input, if that was told.

    Raises:
        InputError: if it is not of the form in `IMAGES`.
    """
    if text is None:
        return None
    from onnxcompress.data.images import Images

    return Images.from_text(text)
