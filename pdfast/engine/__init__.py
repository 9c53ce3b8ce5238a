"""What makes a run fast and safe: devices, updates, optimizer, checkpoints, logs and signals."""
