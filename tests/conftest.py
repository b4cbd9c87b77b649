"""What all tests share."""

import os
import secrets

from hypothesis import settings

# Ray settles its authentication once per process: every local Ray of one test run must use the same mode and token.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

# Speed is never asserted: a busy machine is no failure.
settings.register_profile("lectern", deadline=None)
settings.load_profile("lectern")
