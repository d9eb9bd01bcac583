"""One form for graphs: what computes nothing is gone, complex numbers are pairs, attention has its usual axes."""
