"""The passes, one graph rewrite a file, in the order in which a pipeline runs them."""
