"""Base model, adapters, backends and generation."""
