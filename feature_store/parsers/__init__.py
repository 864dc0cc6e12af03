"""Files of other programs, read with limits: alignments, npz, pickles that are never executed."""
