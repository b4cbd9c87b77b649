"""Other tools' caches of teacher logits, read into datasets of ours."""
