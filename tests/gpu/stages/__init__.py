"""The stages of tests/gpu/day.py, each run as a module in a process of its own."""
