"""The foreshock commands that come with the collector."""
