"""What is decided about a step, and done to it."""
