"""Public long-context benchmarks in their published file formats: LongBench, BABILong, LongMemEval."""
