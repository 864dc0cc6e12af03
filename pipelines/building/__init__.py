"""A build from end to end: here, on an engine, handed over, or a task of an array of jobs."""
