"""Predicts memory and step time of a layout, and searches for the fastest one that fits."""
