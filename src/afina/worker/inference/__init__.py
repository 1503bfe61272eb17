"""Using a trained model: classifier, ensembles, embeddings, export, model card, ONNX."""
