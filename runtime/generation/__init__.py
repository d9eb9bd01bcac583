"""Generation: tokens one by one, each at a depth of its own, over caches."""
