"""What clients send: typed bodies, from which the API description is made."""
