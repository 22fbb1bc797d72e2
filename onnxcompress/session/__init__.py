"""Runs models in ONNX Runtime: the one place that imports it.

Weights are not serialised: the graph is handed over as a small protobuf whose large initializers
are only named, and their arrays (memory-mapped where the model came from a file) are passed
beside it. Models over 2 GB run this way too. Without optimization the session computes with these
very arrays and starts in milliseconds; with it, ONNX Runtime takes a copy.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcompress.contract import Array
from onnxcompress.errors import InputError
from onnxcompress.session.optimized import optimized_model, profile, start_unordered
from onnxcompress.session.runtime import (
    FOREIGN,
    Optimization,
    from_ort,
    one_sentence,
    options_of,
    ort,
    title_of,
    to_ort,
    trim,
    weighs,
)
from onnxcompress.session.start import start

__all__ = [
    "Binding",
    "Feed",
    "Optimization",
    "Session",
    "optimized_model",
    "profile",
    "weighs",
]

Feed = Mapping[str, Any]
_TRIMMED = 1 << 23
"""Bytes of weights from which the heap is worth looking through, which takes milliseconds."""


class Session:
    """A model ready to run on the CPU.

    Args:
        model: a model in memory, which is not altered, or the path of one.
        outputs: the values to return, in this order; any value of the main graph (a graph input
            and an initializer too). The graph's outputs when None.
        optimization: how much ONNX Runtime rewrites the graph before it runs.
        threads: threads of one operator; 0 leaves the choice to ONNX Runtime.
        prepack: let kernels keep a second, reordered copy of the weights: faster runs, but a
            slower start and more memory, so turn it off for a few runs of a large model.
        spinning: let idle threads wait busily; turn it off where other threads need the cores.
        frugal: for many outputs at once: give each value its own memory for as long as it is
            needed instead of planning one block for all, and give back what lies freed in the heap
            where weights left much in it.
        unordered: outputs whose elements may come in any order, which saves a copy of those that
            kernels keep in a layout of their own.
        training: for graphs that hold gradients: kernels that give the same bits at each run,
            pairs of QuantizeLinear and DequantizeLinear that stay what they are, and no plan of
            memory, for which another block as large as all values would be taken beside those of
            the first run.
        verbose: show ONNX Runtime's own warnings.

    Raises:
        InputError: if a wanted output does not exist or ONNX Runtime refuses the model.
    """

    def __init__(
        self,
        model: ir.Model | Path,
        *,
        outputs: Sequence[str] | None = None,
        optimization: Optimization = "all",
        threads: int = 0,
        prepack: bool = True,
        spinning: bool = True,
        frugal: bool = False,
        unordered: Collection[str] = (),
        training: bool = False,
        verbose: bool = False,
    ) -> None:
        title = title_of(model)
        options = options_of(optimization, verbose)
        options.intra_op_num_threads = threads
        options.enable_mem_pattern = not (frugal or training)
        options.add_session_config_entry("session.disable_prepacking", str(int(not prepack)))
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
        options.use_deterministic_compute = training
        options.add_session_config_entry("session.disable_quant_qdq", str(int(training)))
        self._title = title
        trims = frugal and weighs(model) > _TRIMMED
        if trims:
            trim()
        started: tuple[Any, list[Any]] | None = None
        if unordered and optimization == "all":
            with suppress(InputError):  # ONNX Runtime cannot always read what it wrote
                started = start_unordered(model, outputs, unordered, options, title), []
        self._session, self._lent = started or start(model, outputs, options, title)
        if trims:
            trim()
        self._run_options = ort.RunOptions()
        self._run_options.log_severity_level = options.log_severity_level
        ports = (*self._session.get_inputs(), *self._session.get_outputs())
        kinds = {port.type for port in ports}
        found = self._session.get_outputs()
        self._lists = [port.name for port in found if port.type.startswith("seq")]
        arrays_only = all(k.startswith("tensor(") and k != "tensor(string)" for k in kinds)
        self._as_values = arrays_only or not kinds.isdisjoint(FOREIGN)
        self.inputs: tuple[str, ...] = tuple(v.name for v in self._session.get_inputs())
        self.outputs: tuple[str, ...] = tuple(v.name for v in self._session.get_outputs())

    def run(self, feed: Feed) -> dict[str, Array]:
        """The outputs by name for one feed (arrays by input name), for reading only: no copies.

        Raises:
            InputError: if the feed does not fit the model or an operator fails on it.
        """
        with one_sentence(f"cannot run {self._title}", "give data that suits the model"):
            if self._as_values:
                found = self._run_values(feed)
                return {name: found[name] for name in self.outputs}
            # Numbers that numpy makes of arrays without axes become arrays again.
            arrays = {k: v for k, v in feed.items() if not isinstance(v, list)}
            values = {**feed, **{k: np.asarray(v) for k, v in arrays.items()}}
            outputs = self._session.run(self.outputs, values, self._run_options)
        return dict(zip(self.outputs, outputs, strict=True))

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Binding:
        """A way to run on these very arrays, again and again."""
        failure = f"cannot run {self._title}"
        return Binding(self._session, failure, inputs, outputs)

    def _run_values(self, feed: Feed) -> dict[str, Array]:
        """Lists need a run of their own: they come as arrays only, foreign tensors never do."""
        values = {name: to_ort(array) for name, array in feed.items()}
        found: dict[str, Array] = {}
        if tensors := [name for name in self.outputs if name not in self._lists]:
            outputs = self._session.run_with_ort_values(tensors, values, self._run_options)
            found |= zip(tensors, map(from_ort, outputs), strict=True)
        if self._lists:
            outputs = self._session.run(self._lists, values, self._run_options)
            found |= zip(self._lists, outputs, strict=True)
        return found


class Binding:
    """Arrays that a session reads its inputs from and writes its outputs to; nothing is copied.

    They must be C-contiguous, of the session's types and of the shapes that come out. An output
    may be the array of an input if all that reads the input goes into that output: the kernels
    that compute value by value write where they read.
    """

    def __init__(
        self,
        session: Any,
        failure: str,
        inputs: Mapping[str, Array],
        outputs: Mapping[str, Array],
    ) -> None:
        self._session, self._failure = session, failure
        self._bound = session.io_binding()
        self._arrays: dict[str, Any] = {}
        self.feed(inputs)
        for name, array in outputs.items():
            self._arrays[name] = to_ort(array)
            self._bound.bind_ortvalue_output(name, self._arrays[name])

    def feed(self, inputs: Mapping[str, Array]) -> None:
        """Read these inputs from other arrays from now on."""
        for name, array in inputs.items():
            self._arrays[name] = to_ort(array)
            self._bound.bind_ortvalue_input(name, self._arrays[name])

    def run(self) -> None:
        """Compute the outputs into their arrays.

        Raises:
            InputError: if the arrays do not fit the model or an operator fails on them.
        """
        with one_sentence(self._failure, "give data that suits the model"):
            self._session.run_with_iobinding(self._bound)
