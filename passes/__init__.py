"""The passes, one graph rewrite a file, in the order in which a pipeline runs them."""

from onnxcompress.contract import Pass

ALL: tuple[type[Pass], ...] = ()
