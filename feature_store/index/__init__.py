"""The index of a store: a Delta table whose log is the commit log; versions, tags, transactions."""
