"""Policies: what turns scores into "leave" or "go on"."""
