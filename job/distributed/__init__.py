"""The ranks of one run: which is which, which are alive, and what they exchange."""
