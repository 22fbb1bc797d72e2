"""Which passes make up each way of compressing a model, in order."""

from __future__ import annotations

from typing import Any, Literal

from onnxcompress import targets
from onnxcompress.contract import Pass
from onnxcompress.passes import EXACT
from onnxcompress.passes.convert_float16 import ConvertFloat16
from onnxcompress.passes.correct_bias import CorrectBias
from onnxcompress.passes.equalize import Equalize
from onnxcompress.passes.forget_shapes import ForgetShapes
from onnxcompress.passes.fuse_gemm import FuseGemm
from onnxcompress.passes.infer_shapes import InferShapes
from onnxcompress.passes.insert_qdq import InsertQdq
from onnxcompress.passes.quantize_dynamic import QuantizeDynamic
from onnxcompress.passes.quantize_weights import QuantizeWeights
from onnxcompress.passes.raise_opset import RaiseOpset
from onnxcompress.passes.remove_unused import RemoveUnused
from onnxcompress.passes.round_second_order import RoundSecondOrder
from onnxcompress.passes.shield_floats import ShieldFloats
from onnxcompress.passes.smooth import Smooth
from onnxcompress.passes.split_transposed import SplitTransposed
from onnxcompress.passes.write_as_add import WriteAsAdd
from onnxcompress.passes.write_as_div import WriteAsDiv

Effort = Literal["fast", "thorough", "best"]
Half = Literal["float16", "bfloat16"]
Patterns = tuple[str, ...]
_LAST = (RemoveUnused(), ForgetShapes())
_WITHOUT_PAIRS = ("LSTM", "Gather")
_BFLOAT16_OPSET = 22  # Conv and the pools take it from there on
_BLOCKS_OPSET = 21  # DequantizeLinear with a block_size


def exact() -> tuple[Pass, ...]:
    """Rewrites that leave the float function as it is."""
    return tuple(kind() for kind in EXACT)


def before_static(
    target: str = "cpu", activations: targets.Activations | None = None
) -> tuple[Pass, ...]:
    """What comes before pairs are placed; calibration observes the model as it is after these."""
    opset = targets.load(target).with_activations(activations).opset
    return (
        *exact(),
        RaiseOpset(minimum=opset),
        SplitTransposed(),
        InferShapes(),
        WriteAsAdd(),
        WriteAsDiv(),
        FuseGemm(),
    )


def static(
    target: str = "cpu", effort: Effort = "fast", *, packed: Patterns = (), **options: Any
) -> tuple[Pass, ...]:
    """Weights and activations as integers; `options` are those of `InsertQdq`.

    Recurrent weights and tables of embeddings, which no pair reaches, are quantized by themselves.

    Args:
        effort: fast rounds to nearest; thorough first brings channels to alike ranges, rounds by
            each layer's output and corrects biases, for which it runs the model several times;
            best does the same, and `api.rewrite` reconstructs behind it.
        packed: patterns of nodes that get weights in 4 bits instead, and compute in float.
    """
    thorough = effort != "fast"
    if packed:
        options["exclude"] = (*options.get("exclude", ()), *packed)
    return (
        *before_static(target, options.get("activations")),
        *((Equalize(), Smooth()) if thorough else ()),
        InsertQdq(target=target, **options),
        *((RoundSecondOrder(target=target), CorrectBias(target=target)) if thorough else ()),
        *_in_four_bits(target, packed),
        ShieldFloats(target=target),
        without_pairs(target),
        *_LAST,
    )


def without_pairs(target: str = "cpu") -> QuantizeDynamic:
    """What quantizes, in the static scheme too, weights that no pair reaches."""
    return QuantizeDynamic(target=target, include=_WITHOUT_PAIRS)


def _in_four_bits(target: str, packed: Patterns) -> tuple[Pass, ...]:
    return (QuantizeWeights(target=target, include=packed),) if packed else ()


def dynamic(target: str = "cpu", *, packed: Patterns = (), **options: Any) -> tuple[Pass, ...]:
    """Weights as integers, activations at run time; `options` are those of `QuantizeDynamic`.

    Args:
        packed: patterns of nodes that get weights in 4 bits instead, and compute in float.
    """
    opset = RaiseOpset(minimum=targets.load(target).opset)
    quantize = QuantizeDynamic(target=target, **options)
    few = _in_four_bits(target, packed)
    return (*exact(), opset, InferShapes(), WriteAsDiv(), *few, quantize, *_LAST)


def weights(target: str = "cpu", **options: Any) -> tuple[Pass, ...]:
    """Weights in few bits, arithmetic in float; `options` are those of `QuantizeWeights`."""
    opset = RaiseOpset(minimum=max(_BLOCKS_OPSET, targets.load(target).opset))
    quantize = QuantizeWeights(target=target, **options)
    return (*exact(), opset, SplitTransposed(), InferShapes(), WriteAsDiv(), quantize, *_LAST)


def float8(target: str, **options: Any) -> tuple[Pass, ...]:
    """Operands of matrix products and convolutions in 8-bit floats, from statistics.

    `options` are those of `InsertQdq`.

    Raises:
        InputError: if the target computes nothing in float8.
    """
    dtype = targets.load(target).float8
    insert = InsertQdq(target=target, activations=dtype, **options)
    return (*before_static(target, dtype), insert, *_LAST)


def half(dtype: Half, target: str = "cpu", **options: Any) -> tuple[Pass, ...]:
    """Weights in 16-bit floats, and arithmetic where the target has kernels for them.

    `options` are those of `ConvertFloat16`.
    """
    runtime = targets.load(target)
    least = _BFLOAT16_OPSET if dtype == "bfloat16" else 13
    convert = ConvertFloat16(dtype=dtype, compute=dtype in runtime.floats, **options)
    return (*exact(), RaiseOpset(minimum=least), InferShapes(), convert, *_LAST)
