"""Metrics, tables and reports: reads the files of runs, never a model."""
