"""What is trained: the Protocol of a task, the compact Evoformer, its losses."""
