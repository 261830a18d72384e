"""Every file format: atomic writes, digests, the manifest that commits a run, tensors, thresholds, locks."""
