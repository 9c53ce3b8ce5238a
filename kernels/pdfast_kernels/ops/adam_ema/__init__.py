"""Adam with clipping and an EMA of the weights in one launch."""
