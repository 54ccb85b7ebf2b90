"""``http://`` and ``https://``: connections, redirects, responses, and the index pages of web servers."""
