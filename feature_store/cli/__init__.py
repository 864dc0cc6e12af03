"""The command line: options and tables; every command calls a function of another room."""
