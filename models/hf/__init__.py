"""Hugging Face checkpoints, both ways: a declarative file per family, and what reads and writes the files."""
