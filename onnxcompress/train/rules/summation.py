"""Rule of Einsum: the gradient of an operand is an Einsum of the others and the result's."""

from __future__ import annotations

from typing import Final

import onnx_ir as ir

from onnxcompress.train.rules.broadcasting import sum_to
from onnxcompress.train.tape import Gradients, Rule, Tape, Unsupported, rank_of


def einsum(tape: Tape, node: ir.Node, given: Gradients) -> Gradients:
    """With Y = Σ A·B, dA is Σ dY·B over the indices that A does not have.

    An index that only one operand has was summed over by itself: its gradient is the same all
    along that axis.

    Source: ONNX Einsum.
    """
    (dy,) = given
    terms, result = _terms(node)
    found: list[ir.Value | None] = []
    for index, (value, term) in enumerate(zip(node.inputs, terms, strict=True)):
        if value is None or not tape.wanted(value):
            found.append(None)
            continue
        if len(set(term)) < len(term):
            raise Unsupported("it takes a diagonal")
        others = [i for i in range(len(terms)) if i != index]
        seen = set(result).union(*(terms[i] for i in others))
        kept = "".join(label for label in term if label in seen)
        equation = ",".join((result, *(terms[i] for i in others))) + f"->{kept}"
        part = tape.op("Einsum", [dy, *(node.inputs[i] for i in others)], {"equation": equation})
        alone = [axis for axis, label in enumerate(term) if label not in seen]
        if alone:
            part = tape.op("Unsqueeze", [part, tape.ints(*alone)])
        part = tape.op("Expand", [part, tape.shape(value)])
        found.append(sum_to(tape, part, value, None) if _broadcasts(node) else part)
    return found


def _broadcasts(node: ir.Node) -> bool:
    """Whether an axis of size 1 may stand for one of another size."""
    return any(v is not None and v.shape is not None and 1 in v.shape for v in node.inputs)


def _terms(node: ir.Node) -> tuple[list[str], str]:
    """The labels of each operand and of the result, capital letters in place of an ellipsis."""
    equation = node.attributes.get_string("equation", "").replace(" ", "")
    left, arrow, result = equation.partition("->")
    terms = left.split(",")
    letters = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in equation]
    widths = [
        rank_of(value) - len(term) + 3 if value is not None and "..." in term else 0
        for value, term in zip(node.inputs, terms, strict=True)
    ]
    most = max(widths)
    named = [
        term.replace("...", "".join(letters[most - width : most]))
        for term, width in zip(terms, widths, strict=True)
    ]
    if not arrow:
        labels = "".join(terms).replace(".", "")
        result = "..." * (most > 0) + "".join(
            sorted(label for label in set(labels) if labels.count(label) == 1)
        )
    return named, result.replace("...", "".join(letters[:most]))


RULES: Final[dict[str, Rule]] = {"Einsum": einsum}
