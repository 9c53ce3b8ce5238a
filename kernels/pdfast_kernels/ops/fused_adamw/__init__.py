"""AdamW as a torch.optim.Optimizer on the kernel of `adam_ema`."""
