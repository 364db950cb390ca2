"""Mirrors a run in the experiment tools whose run the script has open."""
