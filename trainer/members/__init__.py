"""Ranks that come and go: who lives, the next generation, state for a newcomer."""
