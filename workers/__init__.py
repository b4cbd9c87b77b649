"""Teachers and the coordinator that feeds them. May import `storage`."""
