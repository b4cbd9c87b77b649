"""Command line, whole-run config, pipeline, plan and report. Imports all rooms; nothing imports it."""
