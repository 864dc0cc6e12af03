"""From arrays to what a model takes: of a sample or a whole step, on the CPU or a device."""
