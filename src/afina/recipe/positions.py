"""Longest input of a model, from its configuration: one rule for `afina init` and for the check of the model folder.

Not covered: models with relative positions that work badly beyond the lengths they were trained on; they state no limit.
"""

from __future__ import annotations

__all__ = ["SHIFTED_POSITIONS", "longest_input"]

#: Model types that count positions from pad_token_id + 1 (`create_position_ids_from_input_ids` in transformers): the first
#: entries of their position table are never used.
SHIFTED_POSITIONS = frozenset(
    {
        "camembert",
        "data2vec-text",
        "esm",
        "ibert",
        "layoutlmv3",
        "lilt",
        "longformer",
        "luke",
        "markuplm",
        "mpnet",
        "roberta",
        "roberta-prelayernorm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
    }
)


def longest_input(model_type: str, max_position_embeddings: object, pad_token_id: int | None) -> int | None:
    """Tokens of the longest input, special tokens included; None where the configuration states no limit.

    Args:
        pad_token_id: 1 where the configuration has none, as in RoBERTa.
    """
    limit = max_position_embeddings
    if not isinstance(limit, int) or limit <= 0:
        return None
    if model_type in SHIFTED_POSITIONS:
        limit -= (pad_token_id if pad_token_id is not None else 1) + 1
    return limit
