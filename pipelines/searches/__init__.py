"""One search or many together, its answer kept under the hash of what was asked, and what it found."""
