"""Tiny models of every architecture that can classify texts, from their configurations, with one plain tokenizer for all.

Weights are random and larger than a fresh model's, so that a wrong batch shows in the logits. `ARCHITECTURES` has a line for each:
what its configuration needs beyond the sizes that all share. torch and transformers are imported inside the functions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.tiny import words

__all__ = ["ARCHITECTURES", "LEFT", "MORE", "architecture_config", "architecture_folder"]

#: The families of the issue, and their relatives.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    # encoders
    "albert": {},
    "bert": {},
    "big_bird": {"attention_type": "original_full"},
    "camembert": {},
    "canine": {"num_hash_buckets": 256, "local_transformer_stride": 16, "max_position_embeddings": 1024},
    "convbert": {},
    "data2vec-text": {},
    "deberta": {"pooler_hidden_size": 32},
    "deberta-v2": {"pooler_hidden_size": 32, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "distilbert": {},
    "electra": {},
    "ernie": {},
    "esm": {"position_embedding_type": "rotary"},
    "flaubert": {},
    "fnet": {},
    "funnel": {"block_sizes": [1, 1], "d_head": 8},
    "ibert": {},
    "layoutlm": {"max_2d_position_embeddings": 64},
    "longformer": {"attention_window": [8, 8]},
    "megatron-bert": {},
    "mobilebert": {"intra_bottleneck_size": 16, "true_hidden_size": 16},
    "modernbert": {},
    "mpnet": {},
    "nystromformer": {"num_landmarks": 8, "segment_means_seq_len": 8},
    "rembert": {"input_embedding_size": 32, "output_embedding_size": 32},
    "roberta": {},
    "roberta-prelayernorm": {},
    "roformer": {},
    "squeezebert": {},
    "xlm": {},
    "xlm-roberta": {},
    "xlnet": {},
    "yoso": {},
    # encoder-decoders
    "bart": {},
    "mbart": {},
    "mt5": {},
    "mvp": {},
    "plbart": {},
    "t5": {},
    "umt5": {},
    # decoders
    "biogpt": {},
    "bloom": {},
    "falcon": {},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {},
    "gpt2": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gpt_neox": {},
    "gptj": {"rotary_dim": 4},
    "llama": {},
    "mistral": {},
    "mixtral": {"num_local_experts": 2},
    "mpt": {},
    "olmo2": {},
    "opt": {},
    "phi": {},
    "phi3": {},
    "qwen2": {},
    "qwen3": {},
    "stablelm": {},
    "starcoder2": {},
}
#: Further kinds, without options of their own.
MORE = (
    *(
        "arcee",
        "bigbird_pegasus",
        "ctrl",
        "diffllama",
        "doge",
        "eurobert",
        "exaone4",
        "glm",
        "glm4",
        "gpt-sw3",
        "gpt_bigcode",
    ),
    *("gte", "helium", "jetmoe", "jina_embeddings_v3"),
)
#: Decoders, whose tokenizers are often saved with padding on the left; XLNet's is so by itself.
LEFT = ("biogpt", "bloom", "falcon", "gemma", "gpt2", "llama", "mistral", "opt", "phi", "qwen2", "xlnet")

_SPECIAL = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "mask_token": "<mask>"}
_EOS = 3
_SIZES = {
    32: "hidden_size d_model n_embd dim emb_dim embedding_size word_embed_proj_dim",
    64: "intermediate_size d_ff ffn_dim encoder_ffn_dim decoder_ffn_dim hidden_dim n_inner d_inner ffn_hidden_size",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers num_key_value_heads",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads",
    8: "head_dim d_kv d_head",
    130: "max_position_embeddings n_positions max_seq_len",
}


def architecture_folder(
    folder: Path, kind: str, num_labels: int | None = 3, side: str = "right", **changes: Any
) -> Path:
    """Write a classifier of `kind` and its tokenizer into `folder`; without `num_labels`, the body alone.

    Args:
        side: the tokenizer's padding side.
        changes: to the configuration, beside those of `ARCHITECTURES`.
    """
    import torch
    import transformers

    tokenizer = _tokenizer(kind, side)
    config = architecture_config(kind, len(tokenizer), **changes)
    if num_labels is not None:
        config.num_labels = num_labels
    bare = num_labels is None and kind != "funnel"  # AutoModel has two bodies for Funnel
    family = transformers.AutoModel if bare else transformers.AutoModelForSequenceClassification
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = family.from_config(config)
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(4)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def architecture_config(kind: str, vocabulary: int = 100, **changes: Any) -> Any:
    """The configuration of a model of `kind` with two small layers."""
    import transformers

    named = {name: size for size, names in _SIZES.items() for name in names.split()}
    named |= {"vocab_size": vocabulary, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": _EOS}
    named["decoder_start_token_id"] = 0 if kind in ("t5", "mt5", "umt5") else _EOS
    known = transformers.AutoConfig.for_model(kind).to_dict()
    options = {name: value for name, value in named.items() if name in known or name == "decoder_start_token_id"}
    return transformers.AutoConfig.for_model(kind, **{**options, **ARCHITECTURES.get(kind, {}), **changes})


def _tokenizer(kind: str, side: str) -> Any:
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    if kind == "canine":
        return transformers.CanineTokenizer()
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys([*_SPECIAL.values(), *words(), *"0123456789.,!?'\""]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    template = "$A </s> <s>" if kind == "xlnet" else "<s> $A </s>" if kind not in _DECODERS else "<s> $A"
    pair = template.replace("$A", "$A </s> $B")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, pair=pair, special_tokens=[("<s>", 2), ("</s>", _EOS)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        padding_side="left" if kind == "xlnet" else side,
        model_max_length=128,
        model_input_names=["input_ids", "attention_mask"],
        **_SPECIAL,
    )


_DECODERS = frozenset(list(ARCHITECTURES)[list(ARCHITECTURES).index("biogpt") :])
