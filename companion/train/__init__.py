"""Training: the loss, the optimizers, the schedule, the loop and its checkpoints."""
