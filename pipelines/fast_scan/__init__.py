"""Which targets pass HMMER's first filter, exactly: C for processors, CUDA C for devices."""
