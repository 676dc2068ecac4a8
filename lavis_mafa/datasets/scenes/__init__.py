"""Scenes composed of emoji drawings, with captions that tell part of what is there and the whole truth of which match."""
