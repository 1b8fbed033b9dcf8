"""Robot datasets as samples, and samples as batches."""
