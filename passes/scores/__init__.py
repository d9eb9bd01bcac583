"""What `insert-scores` is made of: the scores' nodes, short heads and their candidates."""
