"""From a sample's number to its arrays: plan, fetch, slots of shared memory, threads and processes."""
