"""Making it so: transfer, fetching, publishing, and the executor that carries out a plan."""
