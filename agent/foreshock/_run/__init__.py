"""`foreshock run`: attaches to a training whose script does not call `attach`."""
