"""What is measured of a step, on this rank and over all ranks."""
