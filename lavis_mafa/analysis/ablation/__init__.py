"""The papers' ablation tables: their rows, running them, and the table that comes out."""
