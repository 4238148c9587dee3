"""Conversion from and to Hugging Face checkpoints: a declarative file per model family, and readers and writers."""
