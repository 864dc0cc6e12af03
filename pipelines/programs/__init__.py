"""Other programs, started and owned until nothing of them is left: limits, accounting, energy, interrupts."""
