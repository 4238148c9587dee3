"""Stands for transformer_engine.common."""
