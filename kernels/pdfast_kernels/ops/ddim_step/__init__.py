"""One DDIM step."""
