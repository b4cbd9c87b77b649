"""What all tests share."""

import os
import secrets

# Ray settles its authentication once per process: every local Ray of one test run must use the same mode and token.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
