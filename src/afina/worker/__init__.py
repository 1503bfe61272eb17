"""What runs in the container: the only place that imports torch, transformers, datasets and evaluate.

The host never imports it; it is reached as `python -m afina.worker COMMAND`.
"""
