"""All ranks attach together, or none does."""
