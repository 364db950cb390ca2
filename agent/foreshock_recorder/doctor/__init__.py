"""`foreshock doctor`: checks a machine before a job runs on it."""
