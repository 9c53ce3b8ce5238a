"""Adam with clipping and an EMA of the weights in one launch; `fused_adamw`, the same as a torch.optim.Optimizer."""
