"""Rules of LSTM, GRU and RNN: backpropagation through time.

All gates of all steps follow at once from the operator's own output, the hidden states: only what
runs from step to step is left to a Scan, whose body multiplies by the recurrent weight alone. So
any length runs. Gates are given by the operator's order (LSTM: i o f c; GRU: z r h), sizes as in
its specification: X [T, B, I], W [D, G·H, I], R [D, G·H, H], B [D, 2·G·H].

Source: Werbos, Backpropagation through time (1990); ONNX LSTM, GRU and RNN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx_ir as ir

from onnxcompress.train.tape import Gradients, Rule, Tape, Unsupported, present, required, sizes_of


@dataclass(frozen=True)
class Direction:
    """One direction of a cell, its values in the order in which it runs."""

    tape: Tape
    x: ir.Value
    weight: ir.Value
    recurrent: ir.Value
    bias: tuple[ir.Value, ir.Value] | None
    """Of the input's and of the recurrent product."""
    hidden: ir.Value
    before: ir.Value
    """The hidden state that each step began with [T, B, H]."""
    width: int
    runs: ir.Value | None
    """1 where a sequence has not ended, 0 behind its end [T, B, 1]; None where all are full."""

    def op(self, op_type: str, *inputs: ir.Value) -> ir.Value:
        return self.tape.op(op_type, inputs)

    def by(self, value: ir.Value, weight: ir.Value, bias: ir.Value | None) -> ir.Value:
        """value·weightᵀ + bias, for each step."""
        turned = self.tape.op("Transpose", [weight], {"perm": [1, 0]})
        product = self.op("MatMul", value, turned)
        return product if bias is None else self.op("Add", product, bias)

    def gates(self, value: ir.Value, count: int) -> Sequence[ir.Value]:
        sizes = self.tape.ints(*[self.width] * count)
        return self.tape.ops("Split", [value, sizes], {"axis": -1}, outputs=count)

    def products(self) -> tuple[ir.Value, ir.Value]:
        """What the input and the recurrent weight give to the gates."""
        first, second = self.bias or (None, None)
        return self.by(self.x, self.weight, first), self.by(self.before, self.recurrent, second)

    def join(self, *parts: ir.Value) -> ir.Value:
        return self.tape.op("Concat", parts, {"axis": -1})

    def running(self, value: ir.Value) -> ir.Value:
        """`value`, and nothing where a sequence has ended."""
        return value if self.runs is None else self.op("Mul", value, self.runs)

    def held(self, value: ir.Value) -> ir.Value:
        """`value`, and one where a sequence has ended."""
        ended = self.ended()
        return value if not ended else self.op("Add", self.running(value), *ended)

    def ended(self) -> list[ir.Value]:
        """1 where a sequence has ended; nothing where all are full."""
        return [] if self.runs is None else [self.rest(self.runs)]

    def falling(self, squashed: ir.Value) -> ir.Value:
        """The slope of Sigmoid where it gives `squashed`."""
        return self.op("Mul", squashed, self.rest(squashed))

    def rest(self, value: ir.Value) -> ir.Value:
        return self.op("Sub", self.tape.scalar(1, self.x), value)

    def bell(self, squashed: ir.Value) -> ir.Value:
        """The slope of Tanh where it gives `squashed`."""
        return self.rest(self.op("Mul", squashed, squashed))


@dataclass(frozen=True)
class Found:
    """Gradients of what goes into the gates, and of the initial states."""

    by_input: ir.Value
    by_recurrent: Sequence[tuple[ir.Value, ir.Value]]
    """Gates after gates, with what the recurrent weight multiplied for them."""
    initial: Sequence[ir.Value]


Backward = Callable[[Direction, ir.Value, Sequence[ir.Value], ir.Value | None], Found]
"""From the gradients of the hidden states [T, B, H] and of the last states [B, H]."""


def _rnn(d: Direction, dy: ir.Value, last: Sequence[ir.Value], cell: ir.Value | None) -> Found:
    slope = d.running(d.bell(d.hidden))

    def step(tape: Tape, state: Sequence[ir.Value], now: Sequence[ir.Value]) -> _Step:
        dh = tape.op("Add", [state[0], now[0]])
        gate = tape.op("Mul", [dh, now[1]])
        return [_waiting(tape, tape.op("MatMul", [gate, d.recurrent]), dh, now[2:])], [gate]

    (initial,), (gates,) = _scan(d, step, [last[0]], [dy, slope, *d.ended()], outputs=1)
    return Found(gates, [(gates, d.before)], [initial])


def _waiting(tape: Tape, back: ir.Value, dh: ir.Value, ended: Sequence[ir.Value]) -> ir.Value:
    """What goes back to the state before: all of `dh` where the sequence had ended."""
    return tape.op("Add", [back, tape.op("Mul", [dh, *ended])]) if ended else back


def _gru(d: Direction, dy: ir.Value, last: Sequence[ir.Value], cell: ir.Value | None) -> Found:
    """h' = (1 - z)·n + z·h, where the reset gate acts on the recurrent product."""
    from_input, from_hidden = d.products()
    (xz, xr, xn), (hz, hr, hn) = d.gates(from_input, 3), d.gates(from_hidden, 3)
    z, r = (d.op("Sigmoid", d.op("Add", *pair)) for pair in ((xz, hz), (xr, hr)))
    n = d.op("Tanh", d.op("Add", xn, d.op("Mul", r, hn)))
    to_z, to_n = _update(d, z, n)
    to_r = d.op("Mul", to_n, d.op("Mul", hn, d.falling(r)))
    slopes = d.join(to_z, to_r, d.op("Mul", to_n, r))

    def step(tape: Tape, state: Sequence[ir.Value], now: Sequence[ir.Value]) -> _Step:
        dh = tape.op("Add", [state[0], now[0]])
        gates = tape.op("Mul", [tape.op("Concat", [dh] * 3, {"axis": -1}), now[1]])
        kept = tape.op("Mul", [dh, now[2]])
        back = tape.op("Add", [tape.op("MatMul", [gates, d.recurrent]), kept])
        return [back], [gates, tape.op("Mul", [dh, now[3]])]

    sequences = [dy, slopes, d.held(z), to_n]
    (initial,), (gates, plain) = _scan(d, step, [last[0]], sequences, outputs=2)
    by_input = d.join(*d.gates(gates, 3)[:2], plain)
    return Found(by_input, [(gates, d.before)], [initial])


def _update(d: Direction, z: ir.Value, n: ir.Value) -> tuple[ir.Value, ir.Value]:
    """How much of the state's gradient goes to the update gate and to the new state."""
    to_z = d.op("Mul", d.op("Sub", d.before, n), d.falling(z))
    to_n = d.op("Mul", d.rest(z), d.bell(n))
    return d.running(to_z), d.running(to_n)


def _gru_reset_first(
    d: Direction, dy: ir.Value, last: Sequence[ir.Value], cell: ir.Value | None
) -> Found:
    """h' = (1 - z)·n + z·h, where the reset gate acts on the state before it is multiplied."""
    sizes = d.tape.ints(2 * d.width, d.width)
    first, new = d.tape.ops("Split", [d.recurrent, sizes], {"axis": 0}, outputs=2)
    biases = [None, None, None] if d.bias is None else [d.bias[0], *_split(d, d.bias[1], sizes)]
    plain, for_new = _split(d, d.by(d.x, d.weight, biases[0]), sizes)
    gated = d.op("Sigmoid", d.op("Add", plain, d.by(d.before, first, biases[1])))
    z, r = d.gates(gated, 2)
    reset = d.op("Mul", r, d.before)
    n = d.op("Tanh", d.op("Add", for_new, d.by(reset, new, biases[2])))
    to_z, to_n = _update(d, z, n)
    to_r = d.op("Mul", d.before, d.falling(r))

    def step(tape: Tape, state: Sequence[ir.Value], now: Sequence[ir.Value]) -> _Step:
        dh = tape.op("Add", [state[0], now[0]])
        dz, dn, kept = (tape.op("Mul", [dh, now[i]]) for i in (1, 2, 3))
        du = tape.op("MatMul", [dn, new])
        gates = tape.op("Concat", [dz, tape.op("Mul", [du, now[4]])], {"axis": -1})
        own = tape.op("Add", [kept, tape.op("Mul", [du, now[5]])])
        return [tape.op("Add", [own, tape.op("MatMul", [gates, first])])], [gates, dn]

    sequences = [dy, to_z, to_n, d.held(z), to_r, r]
    (initial,), (gates, dn) = _scan(d, step, [last[0]], sequences, outputs=2)
    return Found(d.join(gates, dn), [(gates, d.before), (dn, reset)], [initial])


def _split(d: Direction, value: ir.Value, sizes: ir.Value) -> Sequence[ir.Value]:
    return d.tape.ops("Split", [value, sizes], {"axis": -1}, outputs=2)


def _lstm(d: Direction, dy: ir.Value, last: Sequence[ir.Value], cell: ir.Value | None) -> Found:
    """c' = f·c + i·g and h' = o·tanh(c')."""
    assert cell is not None
    i, o, f, g = d.gates(d.op("Add", *d.products()), 4)
    i, o, f = (d.op("Sigmoid", v) for v in (i, o, f))
    g = d.op("Tanh", g)
    before, after = _cells(d, cell, d.held(f), d.running(d.op("Mul", i, g)))
    shown = d.op("Tanh", after)
    through = d.running(d.op("Mul", o, d.bell(shown)))
    slopes = d.join(
        d.op("Mul", g, d.falling(i)),
        d.op("Mul", shown, d.falling(o)),
        d.op("Mul", before, d.falling(f)),
        d.op("Mul", i, d.bell(g)),
    )

    def step(tape: Tape, state: Sequence[ir.Value], now: Sequence[ir.Value]) -> _Step:
        dh = tape.op("Add", [state[0], now[0]])
        dc = tape.op("Add", [state[1], tape.op("Mul", [dh, now[2]])])
        gates = tape.op("Mul", [tape.op("Concat", [dc, dh, dc, dc], {"axis": -1}), now[1]])
        back = _waiting(tape, tape.op("MatMul", [gates, d.recurrent]), dh, now[4:])
        return [back, tape.op("Mul", [dc, now[3]])], [gates]

    sequences = [dy, d.running(slopes), through, d.held(f), *d.ended()]
    initial, (gates,) = _scan(d, step, last, sequences, outputs=1)
    return Found(gates, [(gates, d.before)], initial)


def _cells(
    d: Direction, cell: ir.Value, kept: ir.Value, added: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """The cell's state before and after each step, which the operator does not give."""

    def step(tape: Tape, state: Sequence[ir.Value], now: Sequence[ir.Value]) -> _Step:
        after = tape.op("Add", [tape.op("Mul", [state[0], now[0]]), now[1]])
        return [after], [tape.op("Identity", [state[0]]), tape.op("Identity", [after])]

    _, (before, after) = _scan(d, step, [cell], [kept, added], outputs=2, backward=False)
    return before, after


_Step = tuple[Sequence[ir.Value], Sequence[ir.Value]]
Body = Callable[[Tape, Sequence[ir.Value], Sequence[ir.Value]], _Step]


def _scan(
    d: Direction,
    step: Body,
    states: Sequence[ir.Value],
    sequences: Sequence[ir.Value],
    *,
    outputs: int,
    backward: bool = True,
) -> tuple[Sequence[ir.Value], Sequence[ir.Value]]:
    """The last states, and the outputs of all steps, of a body that runs from the last to first."""
    tape, kind = d.tape, d.x.type
    ports = [ir.Value(name=tape.name("step_grad"), type=kind) for _ in (*states, *sequences)]
    body = ir.Graph(ports, [], nodes=[], opset_imports=dict(tape.graph.opset_imports))
    body.name = tape.name("step_grad")
    inner = tape.within(body)
    after, given = step(inner, ports[: len(states)], ports[len(states) :])
    for value in (*after, *given):
        value.type = kind
    body.outputs.extend((*after, *given))
    options = {
        "body": body,
        "num_scan_inputs": len(sequences),
        "scan_input_directions": [int(backward)] * len(sequences),
        "scan_output_directions": [int(backward)] * outputs,
    }
    found = tape.ops("Scan", [*states, *sequences], options, outputs=len(states) + outputs)
    return found[: len(states)], found[len(states) :]


_CELLS: Final[dict[str, tuple[Backward, int, tuple[str, ...]]]] = {
    "RNN": (_rnn, 1, ("Tanh",)),
    "GRU": (_gru, 3, ("Sigmoid", "Tanh")),
    "LSTM": (_lstm, 4, ("Sigmoid", "Tanh", "Tanh")),
}


def recurrent(tape: Tape, node: ir.Node, given: Gradients) -> Gradients:
    """Gradients of x, weights, bias and initial states, direction by direction."""
    directions, width = _checked(tape, node)
    hidden = tape.output(node, 0)
    states = 2 if node.op_type == "LSTM" else 1
    given = [*given, *[None] * (1 + states - len(given))]
    parts = [_direction(tape, node, given, hidden, index, width) for index in range(directions)]
    dx = parts[0][0] if directions == 1 else tape.op("Sum", [p[0] for p in parts])
    found = [tape.op("Concat", [p[i] for p in parts], {"axis": 0}) for i in range(1, len(parts[0]))]
    dw, dr, db, *initial = found
    return [dx, dw, dr, db, None, *initial]


def _checked(tape: Tape, node: ir.Node) -> tuple[int, int]:
    """How many directions, and how wide the hidden state is."""
    _, _, activations = _CELLS[node.op_type]
    wanted = [name.lower() for name in activations]
    chosen = [name.lower() for name in node.attributes.get_strings("activations", activations)]
    directions, _, width = sizes_of(required(node, 2))
    if chosen not in (wanted, wanted * directions):
        raise Unsupported(f"its activations are {', '.join(chosen)}")
    if present(node, 7) is not None or "clip" in node.attributes:
        raise Unsupported("it has peepholes or clips its gates")
    if any(node.attributes.get_int(name, 0) for name in ("layout", "input_forget")):
        raise Unsupported("it has its batch first or couples its gates")
    if any(tape.wanted(v) for v in node.inputs[7:]):
        raise Unsupported("its peepholes cannot be trained")
    return directions, width


def _direction(
    tape: Tape, node: ir.Node, given: Gradients, hidden: ir.Value, index: int, width: int
) -> Sequence[ir.Value]:
    """Gradients of x, and with an axis of directions in front of the weights, bias and states."""
    rule, gates, _ = _CELLS[node.op_type]
    if rule is _gru and not node.attributes.get_int("linear_before_reset", 0):
        rule = _gru_reset_first
    reverse = index == 1 or node.attributes.get_string("direction", "forward") == "reverse"
    x, lengths = required(node, 0), present(node, 4)

    def own(value: ir.Value, axis: int = 0) -> ir.Value:
        return tape.op("Gather", [value, tape.constant(np.array(index))], {"axis": axis})

    def ordered(value: ir.Value) -> ir.Value:
        return _reversed(tape, value, lengths) if reverse else value

    states = ordered(own(hidden, 1))
    shape = tape.op("Shape", [states], {"start": 1})
    nothing = tape.op("Expand", [tape.scalar(0, x), shape])
    initial = [own(v) if (v := present(node, i)) is not None else nothing for i in (5, 6)]
    first = tape.op("Unsqueeze", [initial[0], tape.ints(0)])
    earlier = tape.op("Slice", [states, tape.ints(0), tape.ints(-1), tape.ints(0)])
    bias = present(node, 3)
    halves = None
    if bias is not None:
        pair = tape.ints(gates * width, gates * width)
        one, two = tape.ops("Split", [own(bias), pair], {"axis": 0}, outputs=2)
        halves = (one, two)
    d = Direction(
        tape=tape,
        x=ordered(x),
        weight=own(required(node, 1)),
        recurrent=own(required(node, 2)),
        bias=halves,
        hidden=states,
        before=tape.op("Concat", [first, earlier], {"axis": 0}),
        width=width,
        runs=None if lengths is None else _running(tape, x, lengths),
    )
    d.x.type = x.type
    dy = (
        tape.op("Mul", [states, tape.scalar(0, x)])
        if given[0] is None
        else ordered(own(given[0], 1))
    )
    last = [nothing if g is None else own(g) for g in given[1:]]
    found = rule(d, d.running(dy), last, initial[1])
    return _weights(d, found, ordered)


def _weights(
    d: Direction, found: Found, ordered: Callable[[ir.Value], ir.Value]
) -> Sequence[ir.Value]:
    """The sums over all steps and samples that the weights' gradients are."""
    tape, front = d.tape, d.tape.ints(0)

    def rows(value: ir.Value) -> ir.Value:
        return tape.op("Flatten", [value], {"axis": -1})

    pairs = ((found.by_input, d.x), *found.by_recurrent)
    weight, *parts = (tape.op("Gemm", [rows(a), rows(b)], {"transA": 1}) for a, b in pairs)
    sums = [tape.op("ReduceSum", [a, tape.ints(0, 1)], {"keepdims": 0}) for a, _ in pairs]
    dx = ordered(tape.op("MatMul", [found.by_input, d.weight]))
    recurrent, bias = (tape.op("Concat", values, {"axis": 0}) for values in (parts, sums))
    inner = (weight, recurrent, bias, *found.initial)
    return [dx, *(tape.op("Unsqueeze", [value, front]) for value in inner)]


def _reversed(tape: Tape, value: ir.Value, lengths: ir.Value | None) -> ir.Value:
    """The last step first, of each sequence within its length."""
    if lengths is not None:
        ends = tape.op("Cast", [lengths], {"to": ir.DataType.INT64.value})
        return tape.op("ReverseSequence", [value, ends], {"time_axis": 0, "batch_axis": 1})
    axes, step = tape.ints(0), tape.ints(-1)
    return tape.op("Slice", [value, tape.ints(-1), tape.ints(-(2**31)), axes, step])


def _running(tape: Tape, x: ir.Value, lengths: ir.Value) -> ir.Value:
    """1 where a sequence has not ended [T, B, 1]."""
    start, step = (tape.constant(np.array(n)) for n in (0, 1))
    count = tape.op("Squeeze", [tape.dim(x, 0), tape.ints(0)])
    steps = tape.op("Unsqueeze", [tape.op("Range", [start, count, step]), tape.ints(1)])
    ends = tape.op("Cast", [lengths], {"to": ir.DataType.INT64.value})
    before = tape.cast(tape.op("Less", [steps, ends]), x)
    return tape.op("Unsqueeze", [before, tape.ints(2)])


RULES: Final[dict[str, Rule]] = dict.fromkeys(_CELLS, recurrent)
