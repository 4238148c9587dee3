"""The configuration of a run: typed settings, their validation, and Hydra presets."""
