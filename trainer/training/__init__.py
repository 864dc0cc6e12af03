"""One run on one rank: batches in, steps, the commit point, looks at held-out records, reports."""
