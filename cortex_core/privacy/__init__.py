"""What must not be remembered: filters between reading and writing."""
