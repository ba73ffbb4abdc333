"""Measures the model on held-out rows, before and after training."""
