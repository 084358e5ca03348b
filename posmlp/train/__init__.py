"""Training: `recipe`, a `run` of it, its loop (`trainer`), its `folder`, and its processes (`world`)."""
