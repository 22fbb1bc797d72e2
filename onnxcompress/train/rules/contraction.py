"""Rules of operators that multiply matrices."""

from __future__ import annotations

from typing import Final

import onnx_ir as ir

from onnxcompress.train.rules.broadcasting import Dims, stated, sum_to, unbroadcast
from onnxcompress.train.tape import Gradients, Rule, Tape, present, rank_of, required


def gemm(tape: Tape, node: ir.Node, given: Gradients) -> Gradients:
    """Y = alpha·A'·B' + beta·C, with A' and B' transposed as the node says."""
    dy, a, b = given[0], required(node, 0), required(node, 1)
    flip_a, flip_b = (node.attributes.get_int(name, 0) for name in ("transA", "transB"))
    alpha = node.attributes.get_float("alpha", 1.0)

    def product(left: ir.Value | None, right: ir.Value | None, flips: tuple[int, int]) -> ir.Value:
        options = {"transA": flips[0], "transB": flips[1], "alpha": alpha}
        return tape.op("Gemm", [left, right], options)

    da = db = None
    if tape.wanted(a):
        da = product(b, dy, (flip_b, 1)) if flip_a else product(dy, b, (0, 1 - flip_b))
    if tape.wanted(b):
        db = product(dy, a, (1, flip_a)) if flip_b else product(a, dy, (1 - flip_a, 0))
    return [da, db, _bias(tape, node, dy)]


def _bias(tape: Tape, node: ir.Node, dy: ir.Value | None) -> ir.Value | None:
    bias = present(node, 2)
    if bias is None or dy is None or not tape.wanted(bias):
        return None
    beta = node.attributes.get_float("beta", 1.0)
    scaled = dy if beta == 1 else tape.op("Mul", [dy, tape.scalar(beta, bias)])
    return unbroadcast(tape, scaled, bias, node.outputs[0])


def matmul(tape: Tape, node: ir.Node, given: Gradients) -> Gradients:
    """dA = dY·Bᵀ and dB = Aᵀ·dY, summed over the axes that were broadcast.

    A matrix on the right of a batch is one product with all rows of the batch: Gemm sums over
    them without a transposed copy. A vector is a matrix of one row (left) or column (right).
    """
    dy, a, b = given[0], required(node, 0), required(node, 1)
    assert dy is not None
    if rank_of(b) == 2 and rank_of(a) >= 2:
        return _by_matrix(tape, a, b, dy)
    outer = stated(node.outputs[0])
    left, right, batch = a, b, None if outer is None else list(outer)
    if rank_of(b) == 1:
        right, dy = _with_axis(tape, b, 1), tape.op("Unsqueeze", [dy, tape.ints(-1)])
        batch = None if batch is None else [*batch, 1]
    if rank_of(a) == 1:
        left, dy = _with_axis(tape, a, 0), tape.op("Unsqueeze", [dy, tape.ints(-2)])
        batch = None if batch is None else [*batch[:-1], 1, batch[-1]]
    rank = max(rank_of(left), rank_of(right))
    da = db = None
    if tape.wanted(a):
        product = tape.op("MatMul", [dy, _flipped(tape, right)])
        da = _settled(tape, product, left, a, batch)
    if tape.wanted(b):
        db = _settled(tape, _left_flipped(tape, left, dy, right, rank), right, b, batch)
    return [da, db]


def _left_flipped(tape: Tape, left: ir.Value, dy: ir.Value, right: ir.Value, rank: int) -> ir.Value:
    """leftᵀ·dy, or (dyᵀ·left)ᵀ where dy has fewer columns: they are gathered across rows."""
    rows, columns = (stated(right) or (None, None))[-2:]
    if not isinstance(rows, int) or not isinstance(columns, int) or columns >= rows:
        return tape.op("MatMul", [_flipped(tape, left), dy])
    product = tape.op("MatMul", [_swapped(tape, dy, rank), left])
    return _swapped(tape, product, rank)


def _by_matrix(tape: Tape, a: ir.Value, b: ir.Value, dy: ir.Value) -> Gradients:
    flat = rank_of(a) == 2
    rows = dy if flat else tape.op("Flatten", [dy], {"axis": -1})
    da = db = None
    if tape.wanted(a):
        da = tape.op("Gemm", [rows, b], {"transB": 1})
        da = da if flat else tape.reshape_like(da, a)
    if tape.wanted(b):
        left = a if flat else tape.op("Flatten", [a], {"axis": -1})
        db = tape.op("Gemm", [left, rows], {"transA": 1})
    return [da, db]


def _with_axis(tape: Tape, vector: ir.Value, axis: int) -> ir.Value:
    matrix = tape.op("Unsqueeze", [vector, tape.ints(axis)])
    (size,) = stated(vector) or (None,)
    matrix.shape = ir.Shape([1, size] if axis == 0 else [size, 1])
    matrix.type = vector.type
    return matrix


def _flipped(tape: Tape, value: ir.Value) -> ir.Value:
    return _swapped(tape, value, rank_of(value))


def _swapped(tape: Tape, value: ir.Value, rank: int) -> ir.Value:
    """With the last two of its axes exchanged."""
    return tape.op("Transpose", [value], {"perm": [*range(rank - 2), rank - 1, rank - 2]})


def _settled(
    tape: Tape, product: ir.Value, matrix: ir.Value, value: ir.Value, result: Dims | None
) -> ir.Value:
    """The product, of the matrix's rows and columns for each of a batch, in the operand's shape."""
    own = stated(matrix)
    outer = None if result is None or own is None else [*result[:-2], *own[-2:]]
    summed = sum_to(tape, product, matrix, outer)
    return summed if matrix is value else tape.reshape_like(summed, value)


RULES: Final[dict[str, Rule]] = {"Gemm": gemm, "MatMul": matmul}
