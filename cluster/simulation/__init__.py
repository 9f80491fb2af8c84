"""The simulated world: devices, their clock, who is asked, whose updates count, how the data shifts."""
