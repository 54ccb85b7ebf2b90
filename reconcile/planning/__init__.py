"""What there is, by stat and by content, and the difference to what is wanted: as data."""
