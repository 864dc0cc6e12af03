"""What outlives a process: snapshots, the tiers they go to, the choice of one to go on from, the lease."""
