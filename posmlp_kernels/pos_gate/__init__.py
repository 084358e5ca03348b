"""The operator: its public function, its specification and its back ends."""
