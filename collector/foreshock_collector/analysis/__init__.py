"""Detection and diagnosis: functions of steps and records. No clock, no I/O."""
