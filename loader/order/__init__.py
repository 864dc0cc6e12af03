"""Which record is sample g: samplings, the keyed permutation, weighted draws, counter RNG, a position."""
