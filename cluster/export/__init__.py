"""A finished run for use elsewhere: a model hub's folder, an ONNX file, an app of Flower."""
