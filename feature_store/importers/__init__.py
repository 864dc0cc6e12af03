"""Layouts of other programs' folders and files, found, read and written into a store."""
