"""Parts: immutable Zarr groups. Written whole once; records, crops and rows are read from them at random."""
