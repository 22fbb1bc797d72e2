"""The passes, one graph rewrite a file, in the order in which a pipeline runs them."""

from onnxcompress.contract import Pass
from onnxcompress.passes.convert_float16 import ConvertFloat16
from onnxcompress.passes.correct_bias import CorrectBias
from onnxcompress.passes.deduplicate_initializers import DeduplicateInitializers
from onnxcompress.passes.equalize import Equalize
from onnxcompress.passes.fold_batchnorm import FoldBatchnorm
from onnxcompress.passes.fold_constants import FoldConstants
from onnxcompress.passes.fold_scales import FoldScales
from onnxcompress.passes.forget_shapes import ForgetShapes
from onnxcompress.passes.fuse_gemm import FuseGemm
from onnxcompress.passes.infer_shapes import InferShapes
from onnxcompress.passes.insert_qdq import InsertQdq
from onnxcompress.passes.prune_magnitude import PruneMagnitude
from onnxcompress.passes.quantize_dynamic import QuantizeDynamic
from onnxcompress.passes.quantize_weights import QuantizeWeights
from onnxcompress.passes.raise_opset import RaiseOpset
from onnxcompress.passes.remove_identity import RemoveIdentity
from onnxcompress.passes.remove_unused import RemoveUnused
from onnxcompress.passes.restore_float import RestoreFloat
from onnxcompress.passes.round_second_order import RoundSecondOrder
from onnxcompress.passes.settle_initializers import SettleInitializers
from onnxcompress.passes.shield_floats import ShieldFloats
from onnxcompress.passes.smooth import Smooth
from onnxcompress.passes.split_transposed import SplitTransposed
from onnxcompress.passes.write_as_add import WriteAsAdd
from onnxcompress.passes.write_as_div import WriteAsDiv

EXACT: tuple[type[Pass], ...] = (
    SettleInitializers,
    RemoveIdentity,  # so that constants behind them are seen
    FoldConstants,
    FoldBatchnorm,
    FoldScales,
    RemoveIdentity,  # reshapes and factors that turned out to do nothing
    RemoveUnused,
    DeduplicateInitializers,
)
"""What `optimize` runs, in this order: the float function stays as it is."""

ALL: tuple[type[Pass], ...] = (
    *dict.fromkeys(EXACT),
    RaiseOpset,
    InferShapes,
    SplitTransposed,
    WriteAsAdd,
    WriteAsDiv,
    FuseGemm,
    PruneMagnitude,
    Equalize,
    Smooth,
    InsertQdq,
    RoundSecondOrder,
    CorrectBias,
    RestoreFloat,
    ShieldFloats,
    QuantizeDynamic,
    QuantizeWeights,
    ConvertFloat16,
    ForgetShapes,
)
