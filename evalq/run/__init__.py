"""Scoring: a text and its models made ready, workers started, windows scored, records written."""
