"""What was measured, kept: per-token columns on disk, metrics computed from them, records."""
