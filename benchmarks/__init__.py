"""bench-fps, its peers and the comparisons whose results lie in benchmarks/results."""
