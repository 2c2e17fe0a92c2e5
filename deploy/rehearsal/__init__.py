"""Two nights and a failed one on one machine, with a real S3 server, Ray cluster and Prometheus; see `__main__`."""
