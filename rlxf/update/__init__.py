"""Training the actor on pairs: losses, learning-rate schedule, optimizer steps."""
