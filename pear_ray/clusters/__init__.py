"""Cluster files, read strictly: Ray's launcher YAML and KubeRay's resources.

Ray's own schema takes anything inside `node_config`, and Kubernetes says no only after `kubectl
apply`; here a typo, a GPU that a machine does not have and a port open to the world are one error
before anything is started. Pydantic only: reading a cluster file loads no Ray, torch or vLLM.
"""
