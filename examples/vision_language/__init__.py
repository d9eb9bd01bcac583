"""Models that answer questions about an image and describe it, and the recipe that trains one on easy-VQA."""
