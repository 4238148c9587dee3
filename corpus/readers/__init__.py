"""Readers of file formats: one file per kind, and the registry of them (formats.py)."""
