"""MAFA for LAVIS: vision-language pre-training that manages false negatives.

Importing this package is cheap: neither LAVIS nor transformers is imported before something needs them.
"""

__version__ = "0.1.0"
