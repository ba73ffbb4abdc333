"""Training: TRL's SFTTrainer, checkpoints, and stopping on a preemption notice."""
