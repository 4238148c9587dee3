"""The transformer around the experts, and Hugging Face's families in its terms (models.hf)."""
