"""Pictures and pages about a store: plots, logo, report."""
