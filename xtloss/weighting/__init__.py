"""What counts, what it weighs, and Z."""
