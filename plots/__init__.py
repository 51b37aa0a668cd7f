"""Charts, one module each; their only input is a list of ResultRecords."""
