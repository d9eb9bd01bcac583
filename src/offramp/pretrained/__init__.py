"""Directories that transformers saved: the model, example inputs, and the settings that its bundle carries."""
