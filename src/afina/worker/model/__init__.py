"""The pretrained model: checks of its folder, tokenizer, head, adapters, rates by depth, training arguments."""
