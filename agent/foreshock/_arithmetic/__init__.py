"""Numbers of a step: norms and the operations on them, on the host or on the device."""
