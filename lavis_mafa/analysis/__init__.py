"""Before, beside and after a training: what data hold, what a job will cost, what a model has learned, and tables of runs."""
