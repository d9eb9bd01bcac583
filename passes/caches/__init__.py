"""What `insert-cache` is made of: what depends on what, the meaning of masks, the rebuilding of a graph for chunks."""
