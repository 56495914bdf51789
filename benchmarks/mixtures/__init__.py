"""Does a found mixture beat the fixed ones? Every method on the same shards, budget and seeds, against baselines.

    python -m benchmarks.mixtures synthetic              # four synthetic domains of known entropy
    python -m benchmarks.mixtures redpajama              # a sample of seven very unequal domains
    python -m benchmarks.mixtures my/shards --steps 500 --only ODM --only Aioli
    python -m benchmarks.mixtures synthetic redpajama --publish      # also the table and plot of docs/methods.md

``methods.py`` lists the rows: how each method is set up and what its outcome is. ``runs.py`` trains one small language
model with the library's loader, losses and rules; a run that is finished is not done again, and rows share runs.
``corpora.py`` makes the shards, ``tables.py`` what is printed. Every held-out loss is measured on samples that no
method saw: neither in training nor in the windows that some methods look at.
"""
