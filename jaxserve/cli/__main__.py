"""`python -m jaxserve.cli` is `jaxserve`."""

from __future__ import annotations

import sys

from jaxserve.cli import main

sys.exit(main())
