"""Arrow's compute functions. They are made when pyarrow is imported, so a type checker cannot see them: hence ``Any``."""

from __future__ import annotations

from typing import Any

import pyarrow.compute

pc: Any = pyarrow.compute
