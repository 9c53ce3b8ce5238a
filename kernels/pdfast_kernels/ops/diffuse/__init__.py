"""Noisy images from uint8."""
