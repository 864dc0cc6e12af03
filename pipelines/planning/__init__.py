"""Which searches a build needs, who does them in which order, and what they will cost."""
