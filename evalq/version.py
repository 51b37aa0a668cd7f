"""The version of evalq, and of the numbers it prints."""

__version__ = "0.1.0"

# Raised when a figure computed from the same log-probabilities changes; stored scores are summed up anew.
METRICS_VERSION = 2

# Of the messages between the command line and its workers (`evalq.run.job`), which may be two installations.
JOB_VERSION = 3
