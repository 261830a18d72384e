"""Measure what a gate, a draft or a server is worth: speed paired against dense, quality in the same run, raw samples kept."""
