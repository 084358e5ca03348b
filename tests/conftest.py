"""Settings for every test, made before anything imports Triton."""

import os

# Without a GPU the Triton back end runs in Triton's interpreter; tests over all back ends then include it.
os.environ.setdefault("TRITON_INTERPRET", "1")
