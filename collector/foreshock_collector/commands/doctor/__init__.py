"""`foreshock doctor collector`: checks the machine of a collector, and what watches it."""
