"""HTTP and HTTPS: connections, redirects, responses, and index pages of web servers."""
