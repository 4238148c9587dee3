"""Models: what families of other projects are in this one's terms (models.hf)."""
