"""What the store holds, who owns it and what an upgrade changes, as values: for the command line, a server and Python."""
