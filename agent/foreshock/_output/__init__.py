"""What leaves the training process."""
