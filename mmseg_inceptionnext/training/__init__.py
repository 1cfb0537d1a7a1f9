"""Train: options, the training function, the runner, its hooks and loops, and where a run resumes."""
