"""Where torch calls the probe."""
