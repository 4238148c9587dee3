"""Stands for Apex."""
