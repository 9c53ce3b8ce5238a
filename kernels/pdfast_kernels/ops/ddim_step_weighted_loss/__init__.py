"""The loss of progressive distillation, from the networks' outputs."""
