"""How sparse targets are packed into Parquet columns."""
