"""The embedded default data: emoji drawn by three artists, with the full truth of which image matches which text."""

from lavis_mafa.datasets.emoji.build import EmojiSummary, build_emoji
from lavis_mafa.datasets.emoji.truth import load_emoji_truth

__all__ = ["EmojiSummary", "build_emoji", "load_emoji_truth"]
