"""The loader's cache: memory, a local folder and a Redis server between the loader and a store far away.

From the ground up: config (what a user says), blocks (what is cached: equal stretches of the files of parts,
which never change), eviction (which of them goes first) with future (when a block is read next, by the
loader's own order), the tiers memory, folder and redis_server, requests (threads, hedged reads), tiers (a
block through all of them, read once however many want it), files (that as access to a store's files).

Imports no torch. Knows nothing of samples but the order they come in.
"""
