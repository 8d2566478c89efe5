"""Searches for a good classifier of scikit-learn's handwritten digits, a task a candidate.   python examples/search_digits.py"""

from itertools import product

import numpy as np
from sklearn import datasets, model_selection, svm

import fleet

images, labels = datasets.load_digits(return_X_y=True)


def accuracy(c: float, gamma: float) -> float:
    """The mean of five folds; the images come along with the function."""
    return float(np.mean(model_selection.cross_val_score(svm.SVC(C=c, gamma=gamma), images, labels, cv=5)))


with fleet.Executor() as pool:  # the cores of this machine, or the cluster at ORCHESTRATOR_ADDR
    candidates = {pool.submit(accuracy, c, gamma): (c, gamma) for c, gamma in product((1, 10, 100), (1e-4, 1e-3, 1e-2))}
    scores = {candidates[done]: done.result() for done in fleet.as_completed(candidates, progress="candidates")}
best = max(scores, key=scores.__getitem__)
print(
    f"the best of {len(scores)} is C={best[0]}, gamma={best[1]}: {scores[best]:.1%} on images that it was not fitted to"
)
if scores[best] < 0.95:
    raise SystemExit("that is no good classifier")
