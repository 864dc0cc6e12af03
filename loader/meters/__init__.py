"""What threads and processes did with their time: counted, traced, reported."""
