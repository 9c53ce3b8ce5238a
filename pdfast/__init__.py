"""pdfast: diffusion models that sample in 8, 4, 2 or 1 steps, by Progressive Distillation (arXiv 2202.00512)."""

__version__ = "0.1.0"
