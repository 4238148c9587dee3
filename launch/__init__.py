"""The entry points: one thin module per command."""
