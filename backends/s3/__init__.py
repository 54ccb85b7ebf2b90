"""``s3://``: the objects of a bucket."""
