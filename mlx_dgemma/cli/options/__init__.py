"""What options of the command line have in common."""
