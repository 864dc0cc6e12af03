"""Looking after a store: verify, repair, compact, garbage, copy."""
