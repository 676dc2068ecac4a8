"""Looking at data with a trained model, offline: one pass, nothing is trained.

``blocks`` encodes a block of the data once, ``candidates`` finds and scores the hardest negatives within its batches. On these two
stand ``counting`` (how many negatives are false) and ``mining`` (which pairs are missing from the annotations).
"""
