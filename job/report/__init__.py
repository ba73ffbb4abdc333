"""Renders the report, the model card and their parts."""
