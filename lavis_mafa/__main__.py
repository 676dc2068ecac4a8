# PYTHON_ARGCOMPLETE_OK
"""``python -m lavis_mafa`` is the same as ``lavis-mafa``; torchrun needs this form."""

import sys

from lavis_mafa.cli.main import main

sys.exit(main())
