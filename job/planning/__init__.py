"""What a job will take, and what there is for it, before anything runs."""
