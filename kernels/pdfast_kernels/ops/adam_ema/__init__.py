"""Adam with clipping and up to two EMAs of the weights in one launch."""
