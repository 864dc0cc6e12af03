"""What a store's bytes mean: schema, settings, the arithmetic of tiles, records in memory.

Reads and writes nothing.
"""
