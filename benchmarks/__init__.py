"""One script a question; each writes its answer into results/. Run from the root: `python -m benchmarks.<name>`."""
