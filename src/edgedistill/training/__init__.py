"""Networks by name, the loop, losses, optimisers and checkpoints that teacher and student share."""
