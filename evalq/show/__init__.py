"""What people see: progress, tables, exports."""
