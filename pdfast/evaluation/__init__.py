"""Metrics of generated images, the feature spaces they are taken in, and what a run keeps of them."""
