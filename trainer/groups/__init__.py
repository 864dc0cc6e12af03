"""Who talks to whom: the process groups of a run, where ranks stand among nodes, what NCCL is told."""
