"""Predictions for whole files, as `afina predict` asks for them: inputs cut into chunks, a part for each, one output."""
