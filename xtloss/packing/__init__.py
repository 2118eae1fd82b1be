"""Several sequences in a row, and back again."""
