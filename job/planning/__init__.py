"""Plans a job's work and compares its needs with what is free, before anything runs."""
