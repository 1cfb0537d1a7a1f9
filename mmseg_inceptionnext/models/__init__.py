"""What is trained: the backbone, the head, their weights, and how a config becomes a model."""
