"""From a laptop to a cluster: what ships, the job that runs it, and its log."""
