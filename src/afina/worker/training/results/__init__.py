"""Results of a training: the model and its predictions, warnings about them, fitted decisions, simple models beside them."""
