"""GroupNorm with FiLM and SiLU."""
