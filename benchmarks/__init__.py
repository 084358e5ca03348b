"""Measurements that tell the truth: ratios in one run, beside the machine's own limits."""
