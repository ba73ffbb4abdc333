"""Who owns an output, which rows its run began with, and how far it got."""
