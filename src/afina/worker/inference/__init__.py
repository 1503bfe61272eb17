"""Using a trained model: classifier, prediction parts, export, model card, ONNX."""
