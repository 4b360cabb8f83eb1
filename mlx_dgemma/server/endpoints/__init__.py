"""What answers them: an `Exchange` for each kind of request."""
