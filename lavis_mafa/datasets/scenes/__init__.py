"""Scenes composed of emoji drawings, with captions that tell part of what is there and the whole truth of which match."""

from lavis_mafa.datasets.scenes.build import ScenesSummary, build_scenes
from lavis_mafa.datasets.scenes.world import World

__all__ = ["ScenesSummary", "World", "build_scenes"]
