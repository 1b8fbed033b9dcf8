"""Plan, prove, survive: what a run needs of a GPU, what it uses, and what happens when there is not enough."""
