"""A translator with off-ramps: the model, the recipe that trained it, and what came out."""
