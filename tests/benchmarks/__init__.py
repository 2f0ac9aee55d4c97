"""What is measured but not tested: the scoreboard's rows, and timings of single mechanisms."""
