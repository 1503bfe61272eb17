"""The Hugging Face Hub: pinned revisions, data sets, and its errors explained."""
