"""Training on the graph itself: losses, gradients and updates are ONNX operators too."""
