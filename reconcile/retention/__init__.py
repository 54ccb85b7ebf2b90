"""What keeps what, and who goes."""
