"""Tokenizers of other libraries as a Hugging Face tokenizer.json: one file per kind."""
