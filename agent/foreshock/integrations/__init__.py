"""Callbacks for trainers: each module imports the package that it is named for."""
