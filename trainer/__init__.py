"""Students: losses, curriculum, the ZeRO loop, evaluation. May import `storage`."""
