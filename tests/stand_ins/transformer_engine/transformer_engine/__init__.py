"""Stands for TransformerEngine."""

__version__ = "2.18.0"
