"""What the benchmark of the reader is made of: rows, and the readers that are compared."""
