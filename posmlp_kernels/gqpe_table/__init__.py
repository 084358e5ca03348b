"""The group-wise quadratic table as an operator: its specification and its back ends."""
