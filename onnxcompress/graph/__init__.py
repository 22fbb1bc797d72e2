"""Reading and rewriting ONNX graphs: what the passes share, with no file and no session."""
