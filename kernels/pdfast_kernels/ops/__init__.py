"""One folder an operation: its contract, its kernel, its plain PyTorch."""
