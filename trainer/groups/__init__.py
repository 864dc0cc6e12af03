"""Who talks to whom: process groups, own sockets, where ranks stand among nodes, what NCCL is told."""
