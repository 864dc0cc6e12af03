"""Ranks that come and go: who lives, the next generation, own sockets, state for a newcomer."""
