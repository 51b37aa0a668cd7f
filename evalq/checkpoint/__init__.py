"""A model's files: where they lie, what their headers say, how many bits they take, who they are."""
