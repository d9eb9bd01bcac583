"""How sites become learners: hidden units in an order, projections as factors."""
