"""The part that runs in the container: the only one that imports torch, transformers, datasets and evaluate.

The host never imports it; it is reached as `python -m afina.worker COMMAND`.
"""
