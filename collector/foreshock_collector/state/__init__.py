"""What is known of each run, and the database it survives in."""
