"""Kubernetes manifests, checked without a cluster: built, held against schemas, and against what they are to run."""
