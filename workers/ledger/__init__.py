"""The spend ledger: reserve before each attempt, settle after, an append-only journal on the dataset's store."""
