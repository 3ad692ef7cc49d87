"""The ONNX and ONNX Runtime backend."""
