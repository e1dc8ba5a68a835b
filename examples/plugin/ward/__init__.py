"""A task, a metric and a data source of one's own: a file each."""
