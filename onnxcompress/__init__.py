"""Make trained ONNX models smaller and faster, and prove that they still work."""
