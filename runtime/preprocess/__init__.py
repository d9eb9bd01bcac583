"""Sound and images as the arrays that a model takes."""
