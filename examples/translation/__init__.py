"""The recipe that trained ``zoo:translator`` and its exits."""
