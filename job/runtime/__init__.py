"""What any job on a cluster needs: preemption notices, scratch, limits, status, logs, exit codes."""
