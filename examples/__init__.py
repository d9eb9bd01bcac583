"""Examples: recipes that train what the benchmarks measure."""
