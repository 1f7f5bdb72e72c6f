"""Hugging Face models as the trainer runs them: loaded, packed, and asked for log-probs."""
