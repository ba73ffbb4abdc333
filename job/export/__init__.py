"""Exports the adapter and the merged weights, which a gate verifies."""
