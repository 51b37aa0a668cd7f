"""What an engine is to the framework: its contract, columns, name in specs, Python and failures."""
